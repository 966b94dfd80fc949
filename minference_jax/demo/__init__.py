"""The browser demo: one long text, dense and sparse prefill side by side. Needs the extra `demo`.

server: starts it; page: its layout in Gradio, over views and plots, which draw; jobs: one job at a time on the device;
runs: what a job does; models: those that the operator lists; needle: built-in examples; uploads, over pdf_text, which
reads PDF files in a process of its own; shield: what of the network the page may use.
"""
