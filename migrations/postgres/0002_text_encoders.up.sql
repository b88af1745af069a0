-- What workers' text encoders and the embeddings that they remember do and take.

ALTER TABLE workers
    ADD COLUMN embedding_hits   bigint NOT NULL DEFAULT 0,
    ADD COLUMN embedding_misses bigint NOT NULL DEFAULT 0,
    ADD COLUMN embedding_bytes  bigint NOT NULL DEFAULT 0,
    ADD COLUMN encoder_reads    bigint NOT NULL DEFAULT 0,
    ADD COLUMN encoder_bytes    bigint NOT NULL DEFAULT 0;

COMMENT ON COLUMN workers.embedding_hits IS 'Prompts'' embeddings that were remembered, since it started.';
COMMENT ON COLUMN workers.embedding_misses IS 'Prompts'' embeddings that had to be computed, since it started.';
COMMENT ON COLUMN workers.embedding_bytes IS 'Bytes of embeddings that it remembers.';
COMMENT ON COLUMN workers.encoder_reads IS 'How often a text encoder''s weights were read, since it started.';
COMMENT ON COLUMN workers.encoder_bytes IS 'About how many bytes of text encoders'' weights are in memory.';
