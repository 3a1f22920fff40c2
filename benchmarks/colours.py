"""Colours and markers that can be told apart, for plots with a line or a point for each of twenty ways and more."""

STRONG = (
    "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:cyan", "tab:olive",
    "navy", "gold", "darkgreen", "magenta",
)  # fmt: skip
PALE = ("silver", "lightsteelblue", "sandybrown", "palegreen", "plum", "rosybrown", "khaki", "paleturquoise", "gray")
MARKERS = "osD^vPX<>hp"
