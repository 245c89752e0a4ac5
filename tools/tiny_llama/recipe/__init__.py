"""The recipe of the shipped tiny Llama: facts and stories, tokenizer, training, export, check.

`build.py` beside this folder is the entry point. Nothing here is imported by the package `hexgen2`.
"""
