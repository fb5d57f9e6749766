"""The index's tables: what a page needs, in the form in which it is asked for.

A latent has one number for the whole suite: its SAE's `first` plus its place there. Rows that are sorted and filtered are narrow
and lie apart from `details`, one zlib blob a latent that holds its whole row of latents.parquet.
"""

VERSION = 2
"""Raised whenever the tables, or what is written into them, change: older indexes are then built anew."""

TABLES = """
CREATE TABLE suite(name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE saes(id INTEGER PRIMARY KEY, folder TEXT UNIQUE, first INTEGER, record TEXT, metrics BLOB, facts TEXT,
    arrow_schema BLOB, is_described INTEGER, num_alive INTEGER, num_labels INTEGER, problem TEXT);
CREATE TABLE latents(id INTEGER PRIMARY KEY, sae INTEGER, latent INTEGER, shuffled INTEGER, firings INTEGER, frequency REAL,
    mean_activation REAL, max_activation REAL, entropy REAL, predictability REAL, nearest REAL, top_tokens BLOB,
    label TEXT, method TEXT, kind TEXT, detection REAL, fuzzing REAL);
CREATE TABLE details(id INTEGER PRIMARY KEY, row BLOB);
CREATE TABLE explanations(id INTEGER PRIMARY KEY, rows TEXT);
CREATE TABLE vocabulary(token INTEGER PRIMARY KEY, piece BLOB, text TEXT, key TEXT, is_special INTEGER);
CREATE TABLE sequences(sequence INTEGER PRIMARY KEY, split TEXT, document TEXT, ids BLOB);
CREATE TABLE postings(token INTEGER, sae INTEGER, latents BLOB, shares BLOB, counts BLOB, PRIMARY KEY(token, sae)) WITHOUT ROWID;
CREATE TABLE matches(sae INTEGER, other INTEGER, latents BLOB, others BLOB, cosines BLOB, PRIMARY KEY(sae, other)) WITHOUT ROWID;
CREATE TABLE splits(narrow INTEGER, wide INTEGER, summary TEXT, rows BLOB, PRIMARY KEY(narrow, wide)) WITHOUT ROWID;
CREATE TABLE slices(name TEXT PRIMARY KEY, value TEXT);
CREATE VIRTUAL TABLE labels USING fts5(label, content='latents', content_rowid='id', tokenize='unicode61 remove_diacritics 2');
"""

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
)
"""Columns of `latents` by which a table can be sorted."""

INDEXES = "\n".join(
    [
        *(f"CREATE INDEX latents_{name} ON latents(sae, {name});" for name in SORTABLE[1:]),
        "CREATE INDEX latents_shuffled ON latents(sae, shuffled);",
        "CREATE INDEX vocabulary_key ON vocabulary(key);",
        "INSERT INTO labels(labels) VALUES('rebuild');",
        "ANALYZE;",
    ]
)
"""What follows when every row is in."""
