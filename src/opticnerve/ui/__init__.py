"""The browser interface, `opticnerve ui`: chat, look, compare, runs and training in one page, on this machine.

Pages are gradio's; gradio is imported within functions, so that the command line does not wait for it.
"""
