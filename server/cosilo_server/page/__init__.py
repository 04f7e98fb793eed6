"""The status page: what a person may see of a federation in a browser. Reads only; no call here changes anything."""
