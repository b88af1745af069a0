-- Takes back 0002: forgets what workers' text encoders did.
ALTER TABLE workers
    DROP COLUMN embedding_hits,
    DROP COLUMN embedding_misses,
    DROP COLUMN embedding_bytes,
    DROP COLUMN encoder_reads,
    DROP COLUMN encoder_bytes;
