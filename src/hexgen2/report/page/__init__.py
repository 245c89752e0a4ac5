"""A plan as one HTML file that needs no network, and its pictures as SVG."""

from hexgen2.report.page.document import plan_page
from hexgen2.report.page.flows import flows_svg
from hexgen2.report.page.markup import standalone
from hexgen2.report.page.network import network_svg
from hexgen2.report.page.progress import Trace, TracePoint, load_trace, trace_document

__all__ = [
    "Trace",
    "TracePoint",
    "flows_svg",
    "load_trace",
    "network_svg",
    "plan_page",
    "standalone",
    "trace_document",
]
