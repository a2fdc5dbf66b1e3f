"""Exact money: prices, the ledger, what is metered, reports. Integer nano-dollars throughout; it knows no HTTP."""
