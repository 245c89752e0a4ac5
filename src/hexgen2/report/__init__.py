"""Plans and results for people: words, tables and pictures."""

from hexgen2.report.picture import save_picture
from hexgen2.report.tables import print_plan
from hexgen2.report.words import group_line, layout_words

__all__ = ["group_line", "layout_words", "print_plan", "save_picture"]
