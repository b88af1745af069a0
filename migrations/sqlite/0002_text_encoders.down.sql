-- Takes back 0002: forgets what workers' text encoders did.
ALTER TABLE workers DROP COLUMN embedding_hits;
ALTER TABLE workers DROP COLUMN embedding_misses;
ALTER TABLE workers DROP COLUMN embedding_bytes;
ALTER TABLE workers DROP COLUMN encoder_reads;
ALTER TABLE workers DROP COLUMN encoder_bytes;
