"""The live page of a service that runs: its files, and its pictures with what was measured."""

from hexgen2.report.live.files import CONTENT_SECURITY_POLICY, File, page_files
from hexgen2.report.live.pictures import flows_now, measured_links, network_now

__all__ = [
    "CONTENT_SECURITY_POLICY",
    "File",
    "flows_now",
    "measured_links",
    "network_now",
    "page_files",
]
