"""Many runs beside one another: trained side by side, read from their folders, compared, and judged by claims.

Numbers in, numbers out: nothing here draws or prints. Imports nothing of report and cli.
"""
