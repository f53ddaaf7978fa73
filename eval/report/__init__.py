"""Result rows as tables, plots and a page."""
