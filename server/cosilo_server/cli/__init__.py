"""`cosilo`, the admin's command line: everything over the wire, signed where the admin sits.

Must not know the coordinator's files, and imports neither torch nor grpc before a command needs them: `cosilo --help`
answers at once.
"""
