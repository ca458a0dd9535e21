"""The colours of all figures."""

from matplotlib.patheffects import withStroke

# Okabe and Ito's palette, told apart with every kind of colour blindness; sky and orange darker, for 3 : 1 on white.
BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#3A98D2", "#009E73"
ORANGE, VERMILION, PURPLE, GREY = "#C08400", "#D55E00", "#CC79A7", "#8C8C8C"

ON_GREY = {"path_effects": [withStroke(linewidth=4, foreground="white")]}  # for lines that cross grey bars
