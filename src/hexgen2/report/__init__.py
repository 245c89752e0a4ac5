"""Plans and results for people: words, tables and pictures."""

from hexgen2.report.frontier import answer_document, print_answer, save_frontier
from hexgen2.report.picture import save_picture
from hexgen2.report.reasons import explanation, print_explanation
from hexgen2.report.tables import print_plan
from hexgen2.report.words import group_line, layout_words

__all__ = [
    "answer_document",
    "explanation",
    "group_line",
    "layout_words",
    "print_answer",
    "print_explanation",
    "print_plan",
    "save_frontier",
    "save_picture",
]
