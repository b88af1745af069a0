-- All that the farm remembers: submissions, their jobs, counters, workers, leftovers.
--
-- Every time in here comes from the process that wrote it, never from the database's own clock.
-- Words (states, lanes, kinds of failure) are text with a CHECK: readable, and easy to extend.

CREATE TABLE submissions (
    submission_id   uuid PRIMARY KEY,
    name            text,
    idempotency_key text UNIQUE,
    request_hash    text,
    max_attempts    integer     NOT NULL CHECK (max_attempts >= 1),
    failure_limit   bigint      CHECK (failure_limit >= 1),
    jobs            bigint      NOT NULL CHECK (jobs >= 1),
    first_job       uuid        NOT NULL,
    created_at      timestamptz NOT NULL,
    CONSTRAINT a_key_stands_for_a_request CHECK ((idempotency_key IS NULL) = (request_hash IS NULL))
);

COMMENT ON TABLE submissions IS 'What clients sent at once. Where its jobs stand is in counters.';
COMMENT ON COLUMN submissions.idempotency_key IS 'The client''s key; a second request with it stores nothing.';
COMMENT ON COLUMN submissions.request_hash IS 'SHA-256 (hex) of the request that came with the key.';
COMMENT ON COLUMN submissions.max_attempts IS 'How many times a job is tried before it fails.';
COMMENT ON COLUMN submissions.failure_limit IS 'Once so many jobs have failed, the rest is cancelled. NULL: never.';
COMMENT ON COLUMN submissions.jobs IS 'How many jobs came with it.';

CREATE TABLE jobs (
    job_id           uuid PRIMARY KEY,
    submission_id    uuid        NOT NULL REFERENCES submissions,
    job_index        bigint      NOT NULL CHECK (job_index >= 0),
    spec             jsonb       NOT NULL,
    model            text        NOT NULL GENERATED ALWAYS AS (spec ->> 'model') STORED,
    lane             text        NOT NULL GENERATED ALWAYS AS (spec ->> 'lane') STORED,
    state            text        NOT NULL,
    attempts         integer     NOT NULL DEFAULT 0,
    last_attempt     integer     NOT NULL DEFAULT 0,
    max_attempts     integer     NOT NULL,
    failed_workers   jsonb       NOT NULL DEFAULT '[]',
    cancel_requested boolean     NOT NULL DEFAULT false,
    worker           text,
    token            uuid,
    expires_at       timestamptz,
    image_key        text,
    sidecar_key      text,
    sha256           text,
    render_ms        bigint,
    error_kind       text,
    error_message    text,
    created_at       timestamptz NOT NULL,
    not_before       timestamptz NOT NULL,
    queued_at        timestamptz,
    started_at       timestamptz,
    finished_at      timestamptz,

    CONSTRAINT state_is_known CHECK (state IN ('pending', 'queued', 'leased', 'done', 'failed', 'cancelled')),
    CONSTRAINT lane_is_known CHECK (lane IN ('interactive', 'bulk')),
    CONSTRAINT attempts_are_bounded CHECK (attempts BETWEEN 0 AND max_attempts AND last_attempt >= attempts),
    CONSTRAINT failed_workers_is_a_list CHECK (jsonb_typeof(failed_workers) = 'array'),
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
)
-- Renewing a lease touches no indexed column: room on the page keeps it a heap-only update.
-- The visibility map is what makes counting waiting jobs cheap: vacuum early.
WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.05,
      autovacuum_analyze_scale_factor = 0.02);

COMMENT ON TABLE jobs IS 'One image to render each. Poll the view job_status, not this.';
COMMENT ON COLUMN jobs.job_index IS 'Its place in the submission, from 0.';
COMMENT ON COLUMN jobs.spec IS 'What to render, complete: the RenderSpec as JSON.';
COMMENT ON COLUMN jobs.state IS 'pending (to be published), queued (on the broker), leased (with a worker); final: done, failed, cancelled.';
COMMENT ON COLUMN jobs.attempts IS 'Attempts spent; a retry by a client and an orderly release give them back.';
COMMENT ON COLUMN jobs.last_attempt IS 'Number of the last attempt; never given twice, since object keys carry it.';
COMMENT ON COLUMN jobs.failed_workers IS 'JSON list of the workers that failed it.';
COMMENT ON COLUMN jobs.cancel_requested IS 'A client wants it stopped: the next heartbeat of its worker says so.';
COMMENT ON COLUMN jobs.token IS 'Fencing token of the lease: every change to a leased job names it.';
COMMENT ON COLUMN jobs.expires_at IS 'When the lease ends unless renewed.';
COMMENT ON COLUMN jobs.not_before IS 'Due from then on: when it was accepted, or later after a failure.';

-- Dispatching, counting what waits, and the reconciler. Only what waits is in it.
CREATE INDEX jobs_waiting ON jobs (model, lane, state, not_before, job_id) WHERE state IN ('pending', 'queued');
-- Listings, each a keyset page by id; the reaper reads the leased ones through the second.
CREATE INDEX jobs_by_submission ON jobs (submission_id, job_id);
CREATE INDEX jobs_by_state ON jobs (state, job_id);
CREATE INDEX jobs_by_submission_and_state ON jobs (submission_id, state, job_id);
CREATE INDEX jobs_by_model ON jobs (model, job_id);

CREATE TABLE job_tags (
    tag    text NOT NULL,
    job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    PRIMARY KEY (tag, job_id)
);

COMMENT ON TABLE job_tags IS 'The tags of a job''s spec once more, to list jobs by.';

CREATE TABLE counters (
    scope       uuid    NOT NULL,
    shard       integer NOT NULL,
    pending     bigint  NOT NULL,
    queued      bigint  NOT NULL,
    leased      bigint  NOT NULL,
    done        bigint  NOT NULL,
    failed      bigint  NOT NULL,
    cancelled   bigint  NOT NULL,
    finished_at timestamptz,
    minute      bigint  NOT NULL DEFAULT 0,
    minute_done bigint  NOT NULL DEFAULT 0,
    before_done bigint  NOT NULL DEFAULT 0,
    PRIMARY KEY (scope, shard)
)
WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);

COMMENT ON TABLE counters IS 'How many jobs stand where, changed in the transaction that moves them. Split over shards so that transactions do not wait for one row; a count is the sum over the shards, and a single shard''s may be negative.';
COMMENT ON COLUMN counters.scope IS 'A submission, or the all-zero id: the whole farm.';
COMMENT ON COLUMN counters.finished_at IS 'When a job last became final.';
COMMENT ON COLUMN counters.minute IS 'The last minute (since 1970) in which a job was done.';
COMMENT ON COLUMN counters.minute_done IS 'Jobs done in that minute.';
COMMENT ON COLUMN counters.before_done IS 'Jobs done in the minute before it.';

CREATE TABLE workers (
    worker_id  text PRIMARY KEY,
    host       text        NOT NULL,
    device     text        NOT NULL,
    serving    text,
    warm       text,
    draining   boolean     NOT NULL DEFAULT false,
    batch_rows bigint      NOT NULL DEFAULT 0,
    done       bigint      NOT NULL DEFAULT 0,
    failed     bigint      NOT NULL DEFAULT 0,
    loads      bigint      NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL,
    last_seen  timestamptz NOT NULL,
    left_at    timestamptz
);

COMMENT ON TABLE workers IS 'What each worker process last said about itself.';
COMMENT ON COLUMN workers.serving IS 'The checkpoint it serves or is about to load.';
COMMENT ON COLUMN workers.warm IS 'The checkpoint whose weights are on its device.';
COMMENT ON COLUMN workers.left_at IS 'When it said goodbye.';

CREATE INDEX workers_by_last_seen ON workers (last_seen);

CREATE TABLE leftovers (
    job_id        uuid        NOT NULL,
    attempt       integer     NOT NULL,
    submission_id uuid        NOT NULL,
    ended_at      timestamptz NOT NULL,
    PRIMARY KEY (job_id, attempt)
);

COMMENT ON TABLE leftovers IS 'Attempts that did not win: objects they may have stored are to be deleted.';

CREATE INDEX leftovers_by_ended_at ON leftovers (ended_at);

CREATE VIEW job_status AS
SELECT job_id,
       submission_id,
       state,
       model,
       spec ->> 'prompt'           AS prompt,
       (spec ->> 'seed')::bigint   AS seed,
       attempts,
       image_key,
       error_message               AS error,
       created_at,
       queued_at,
       started_at,
       finished_at
FROM jobs;

COMMENT ON VIEW job_status IS 'Where each job stands, for those who poll with SQL. Read by job_id, submission_id, state or model: those are indexed.';
COMMENT ON COLUMN job_status.job_id IS 'The job.';
COMMENT ON COLUMN job_status.submission_id IS 'The submission it came with.';
COMMENT ON COLUMN job_status.state IS 'pending (waits in the store), queued (on the broker), leased (being rendered); final: done, failed, cancelled.';
COMMENT ON COLUMN job_status.model IS 'The checkpoint.';
COMMENT ON COLUMN job_status.prompt IS 'What to draw.';
COMMENT ON COLUMN job_status.seed IS 'Seed of the noise.';
COMMENT ON COLUMN job_status.attempts IS 'Attempts begun so far.';
COMMENT ON COLUMN job_status.image_key IS 'Object key of the PNG, once done.';
COMMENT ON COLUMN job_status.error IS 'The last failure, if any attempt failed.';
COMMENT ON COLUMN job_status.created_at IS 'When it was accepted.';
COMMENT ON COLUMN job_status.queued_at IS 'When it was last put on the broker.';
COMMENT ON COLUMN job_status.started_at IS 'When its last attempt began.';
COMMENT ON COLUMN job_status.finished_at IS 'When it became final.';
