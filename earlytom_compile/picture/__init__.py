"""What compression did to a video, for people: one self-contained HTML page, or the same as a PNG.

    observation, = observe(model, pixels)                            # integrations/observe.py: what was decided
    clip = Clip("talk.mp4", frames, observation, asked=(Asked("What is on the slide?", "A cat", "A cat"),))
    write_html("talk.html", [clip], model="llava-onevision-0.5b")
    write_png("talk.png", [clip], model="llava-onevision-0.5b")      # needs matplotlib

content.py says what is shown, reading.py what can be read off it; page.py draws it as HTML, plot.py as PNG. Where
patches are reused, computed.py and plot_computed.py draw what was computed.
"""

from .content import Asked, Clip, Fact
from .page import html_page, write_html
from .plot import write_png

__all__ = ["Asked", "Clip", "Fact", "html_page", "write_html", "write_png"]
