"""What a server remembers: tables, the database they are in, secrets that guard them. It knows no HTTP."""
