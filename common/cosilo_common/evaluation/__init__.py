"""How good a model's images are, beside real ones: distances between sets of features, and who makes the features.

`distances` and `moments` import no torch, so that a site or an admin may use them where only sums are at hand; `lite0`, `inception`,
`extractors` and `scoring` do.
"""
