-- What workers' text encoders and the embeddings that they remember do and take; explained in the migration for
-- Postgres.

ALTER TABLE workers ADD COLUMN embedding_hits INTEGER NOT NULL DEFAULT 0;
ALTER TABLE workers ADD COLUMN embedding_misses INTEGER NOT NULL DEFAULT 0;
ALTER TABLE workers ADD COLUMN embedding_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE workers ADD COLUMN encoder_reads INTEGER NOT NULL DEFAULT 0;
ALTER TABLE workers ADD COLUMN encoder_bytes INTEGER NOT NULL DEFAULT 0;
