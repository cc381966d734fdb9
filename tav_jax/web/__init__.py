"""`tav web`: a page to tune and edit in, an optional extra. Only `page.py` needs Gradio."""
