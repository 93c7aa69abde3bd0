"""The comparison demo: models on the same prompt and noise, blind votes that become training data, training runs.

Everything here but ``ui*.py`` runs without Gradio and without a browser.
"""
