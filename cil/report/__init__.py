"""The page of an experiment: one HTML file that needs nothing but a browser.

    python -m cil.report runs/split_digits

`page.write_report` writes it; nothing is imported here, as `--help` must not wait for pandas.
"""
