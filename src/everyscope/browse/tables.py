"""The index's databases: one of the suite's text, and one for each SAE, so that no page waits for the index of another SAE.

An SAE's database holds what tables are sorted, filtered and searched by, and nothing else: whole rows stay in latents.parquet.
"""

VERSION = 3
"""Raised whenever the tables, or what is written into them, change: older databases are then built anew."""

TEXT_TABLES = """
CREATE TABLE facts(name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE vocabulary(token INTEGER PRIMARY KEY, piece BLOB, text TEXT, key TEXT, is_special INTEGER);
CREATE TABLE sequences(sequence INTEGER PRIMARY KEY, split TEXT, document TEXT, ids BLOB);
"""
TEXT_INDEXES = """
CREATE INDEX vocabulary_text ON vocabulary(text);
CREATE INDEX vocabulary_key ON vocabulary(key);
"""

SAE_TABLES = """
CREATE TABLE facts(name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE latents(latent INTEGER PRIMARY KEY, shuffled INTEGER, firings INTEGER, frequency REAL, mean_activation REAL,
    max_activation REAL, entropy REAL, predictability REAL, nearest REAL, top_tokens BLOB, sequence INTEGER, position INTEGER,
    label TEXT, method TEXT, kind TEXT, detection REAL, fuzzing REAL, quality REAL);
CREATE TABLE postings(token INTEGER PRIMARY KEY, latents BLOB, shares BLOB, counts BLOB);
CREATE TABLE matches(other INTEGER PRIMARY KEY, latents BLOB, others BLOB, cosines BLOB);
CREATE VIRTUAL TABLE labels USING fts5(label, content='latents', content_rowid='latent',
    tokenize='porter unicode61 remove_diacritics 2');
"""
"""`sequence`, `position`: of a latent's strongest example; `quality`: detection minus that of other latents' labels."""

SORTABLE = (
    "latent",
    "frequency",
    "max_activation",
    "mean_activation",
    "entropy",
    "predictability",
    "nearest",
    "detection",
    "fuzzing",
    "quality",
)
"""Columns of `latents` by which a table can be sorted."""

SAE_INDEXES = "\n".join(
    [
        *(f"CREATE INDEX latents_{name} ON latents({name});" for name in SORTABLE[1:]),
        "CREATE INDEX latents_shuffled ON latents(shuffled);",
        "INSERT INTO labels(labels) VALUES('rebuild');",
        "ANALYZE;",
    ]
)
"""What follows when every row is in."""
