"""What a run leaves behind: its identity and its row; and the statistics, sentences, tables, charts and page of rows.

No torch in here.
"""
