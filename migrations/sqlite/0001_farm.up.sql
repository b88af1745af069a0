-- All that the farm remembers: submissions, their jobs, counters, workers, leftovers. The same tables
-- as on Postgres, where each column is explained; what differs is how values are written:
--
--   ids    text (so that people can read and paste them)
--   times  integer, microseconds since 1970-01-01T00:00:00Z (the view job_status shows text)
--   flags  integer, 0 or 1

CREATE TABLE submissions (
    submission_id   TEXT PRIMARY KEY,
    name            TEXT,
    idempotency_key TEXT UNIQUE,
    request_hash    TEXT,
    max_attempts    INTEGER NOT NULL CHECK (max_attempts >= 1),
    failure_limit   INTEGER CHECK (failure_limit >= 1),
    jobs            INTEGER NOT NULL CHECK (jobs >= 1),
    first_job       TEXT    NOT NULL,
    created_at      INTEGER NOT NULL,
    CONSTRAINT a_key_stands_for_a_request CHECK ((idempotency_key IS NULL) = (request_hash IS NULL))
) STRICT;

CREATE TABLE jobs (
    job_id           TEXT PRIMARY KEY,
    submission_id    TEXT    NOT NULL REFERENCES submissions,
    job_index        INTEGER NOT NULL CHECK (job_index >= 0),
    spec             TEXT    NOT NULL CHECK (json_valid(spec)),
    model            TEXT    NOT NULL GENERATED ALWAYS AS (spec ->> 'model') STORED,
    lane             TEXT    NOT NULL GENERATED ALWAYS AS (spec ->> 'lane') STORED,
    state            TEXT    NOT NULL,
    attempts         INTEGER NOT NULL DEFAULT 0,
    last_attempt     INTEGER NOT NULL DEFAULT 0,
    max_attempts     INTEGER NOT NULL,
    failed_workers   TEXT    NOT NULL DEFAULT '[]',
    cancel_requested INTEGER NOT NULL DEFAULT 0 CHECK (cancel_requested IN (0, 1)),
    worker           TEXT,
    token            TEXT,
    expires_at       INTEGER,
    image_key        TEXT,
    sidecar_key      TEXT,
    sha256           TEXT,
    render_ms        INTEGER,
    error_kind       TEXT,
    error_message    TEXT,
    created_at       INTEGER NOT NULL,
    not_before       INTEGER NOT NULL,
    queued_at        INTEGER,
    started_at       INTEGER,
    finished_at      INTEGER,

    CONSTRAINT state_is_known CHECK (state IN ('pending', 'queued', 'leased', 'done', 'failed', 'cancelled')),
    CONSTRAINT lane_is_known CHECK (lane IN ('interactive', 'bulk')),
    CONSTRAINT attempts_are_bounded CHECK (attempts BETWEEN 0 AND max_attempts AND last_attempt >= attempts),
    CONSTRAINT failed_workers_is_a_list CHECK (json_type(failed_workers) = 'array'),
    -- What each state carries; nothing carries another state's data.
    CONSTRAINT queued_has_its_time CHECK (state <> 'queued' OR queued_at IS NOT NULL),
    CONSTRAINT leased_has_a_lease CHECK (
        (state = 'leased') = (token IS NOT NULL) AND (state = 'leased') = (expires_at IS NOT NULL)),
    CONSTRAINT leased_has_a_worker CHECK (
        state <> 'leased' OR (worker IS NOT NULL AND started_at IS NOT NULL AND attempts >= 1)),
    CONSTRAINT only_a_leased_job_waits_for_its_cancellation CHECK (state = 'leased' OR NOT cancel_requested),
    CONSTRAINT final_has_its_time CHECK ((state IN ('done', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CONSTRAINT done_has_a_result CHECK (
        (state = 'done') = (image_key IS NOT NULL) AND (state = 'done') = (sidecar_key IS NOT NULL)
        AND (state = 'done') = (sha256 IS NOT NULL) AND (state = 'done') = (render_ms IS NOT NULL)),
    CONSTRAINT failed_has_an_error CHECK (state <> 'failed' OR error_kind IS NOT NULL),
    CONSTRAINT error_is_whole CHECK ((error_kind IS NULL) = (error_message IS NULL)),
    CONSTRAINT error_kind_is_known CHECK (error_kind IN ('invalid', 'retryable', 'out_of_memory', 'poison'))
) STRICT;

-- Dispatching, counting what waits, and the reconciler. Only what waits is in it.
CREATE INDEX jobs_waiting ON jobs (model, lane, state, not_before, job_id) WHERE state IN ('pending', 'queued');
-- Listings, each a keyset page by id; the reaper reads the leased ones through the second.
CREATE INDEX jobs_by_submission ON jobs (submission_id, job_id);
CREATE INDEX jobs_by_state ON jobs (state, job_id);
CREATE INDEX jobs_by_submission_and_state ON jobs (submission_id, state, job_id);
CREATE INDEX jobs_by_model ON jobs (model, job_id);

CREATE TABLE job_tags (
    tag    TEXT NOT NULL,
    job_id TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE,
    PRIMARY KEY (tag, job_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE counters (
    scope       TEXT    NOT NULL,
    shard       INTEGER NOT NULL,
    pending     INTEGER NOT NULL,
    queued      INTEGER NOT NULL,
    leased      INTEGER NOT NULL,
    done        INTEGER NOT NULL,
    failed      INTEGER NOT NULL,
    cancelled   INTEGER NOT NULL,
    finished_at INTEGER,
    minute      INTEGER NOT NULL DEFAULT 0,
    minute_done INTEGER NOT NULL DEFAULT 0,
    before_done INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (scope, shard)
) STRICT, WITHOUT ROWID;

CREATE TABLE workers (
    worker_id  TEXT PRIMARY KEY,
    host       TEXT    NOT NULL,
    device     TEXT    NOT NULL,
    serving    TEXT,
    warm       TEXT,
    draining   INTEGER NOT NULL DEFAULT 0 CHECK (draining IN (0, 1)),
    batch_rows INTEGER NOT NULL DEFAULT 0,
    done       INTEGER NOT NULL DEFAULT 0,
    failed     INTEGER NOT NULL DEFAULT 0,
    loads      INTEGER NOT NULL DEFAULT 0,
    started_at INTEGER NOT NULL,
    last_seen  INTEGER NOT NULL,
    left_at    INTEGER
) STRICT;

CREATE INDEX workers_by_last_seen ON workers (last_seen);

CREATE TABLE leftovers (
    job_id        TEXT    NOT NULL,
    attempt       INTEGER NOT NULL,
    submission_id TEXT    NOT NULL,
    ended_at      INTEGER NOT NULL,
    PRIMARY KEY (job_id, attempt)
) STRICT, WITHOUT ROWID;

CREATE INDEX leftovers_by_ended_at ON leftovers (ended_at);

-- Where each job stands, for those who poll with SQL. Times are ISO 8601, UTC.
CREATE VIEW job_status AS
SELECT job_id,
       submission_id,
       state,
       model,
       spec ->> 'prompt' AS prompt,
       spec ->> 'seed'   AS seed,
       attempts,
       image_key,
       error_message     AS error,
       strftime('%Y-%m-%dT%H:%M:%fZ', created_at / 1e6, 'unixepoch')  AS created_at,
       strftime('%Y-%m-%dT%H:%M:%fZ', queued_at / 1e6, 'unixepoch')   AS queued_at,
       strftime('%Y-%m-%dT%H:%M:%fZ', started_at / 1e6, 'unixepoch')  AS started_at,
       strftime('%Y-%m-%dT%H:%M:%fZ', finished_at / 1e6, 'unixepoch') AS finished_at
FROM jobs;
