"""The report page: its parts as plain values (views), and the template that arranges them."""
