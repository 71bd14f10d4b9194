"""From rows to what people read: statistics, sentences, tables, plots, a page."""
