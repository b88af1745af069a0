-- Takes back 0001: drops all that the farm remembers.
DROP VIEW job_status;
DROP TABLE leftovers;
DROP TABLE workers;
DROP TABLE counters;
DROP TABLE job_tags;
DROP TABLE jobs;
DROP TABLE submissions;
