"""Volumes in a PostgreSQL database, or one that speaks its protocol and SQL: docs/postgresql.md."""

from polefs.meta.store.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
