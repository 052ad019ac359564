"""The page: an inspection as one HTML file that opens from disk and asks the network for nothing.

`hierarchy` folds graphs into nested modules, `layout` says which box stands where, `mask_image` draws masks, `data`
gathers everything as one JSON document, `page` puts document, style and script into one file.
"""

from fedmef_fx.inspection.page.data import PageContent
from fedmef_fx.inspection.page.page import page_html, write_page
from fedmef_fx.inspection.page.timeline import MemoryPair, Timeline

__all__ = ["MemoryPair", "PageContent", "Timeline", "page_html", "write_page"]
