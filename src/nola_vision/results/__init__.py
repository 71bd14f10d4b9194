"""What a run leaves behind: its identity, its row, and the statistics and tables read from rows. No torch in here."""
