//! Postgres: the store of a farm. Rows that a transaction is about to move are locked first, in id
//! order; whoever only looks for work skips locked rows.

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, Executor};

use super::StoreSettings;
use super::driver::Driver;

/// How long to wait for a free connection, or for a new one to open.
const ACQUIRE: Duration = Duration::from_secs(10);

/// A connection that lay idle for longer is asked whether it still lives before it is used: a
/// restarted server then costs nobody an error.
const TRUSTED: Duration = Duration::from_secs(1);

/// Opens a pool; connections are made as they are needed.
pub(super) fn open(options: PgConnectOptions, settings: &StoreSettings) -> Driver {
    let pool = PgPoolOptions::new()
        .max_connections(settings.connections.max(1))
        .acquire_timeout(ACQUIRE)
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if meta.idle_for > TRUSTED {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        .after_connect(|connection, _| {
            Box::pin(async move {
                // Compiling a plan takes longer than any of the plans runs. A process that hangs in the middle
                // of a transaction must not hold its locks for ever.
                connection.execute("SET jit = off; SET idle_in_transaction_session_timeout = '5min'").await?;
                Ok(())
            })
        })
        .connect_lazy_with(options.application_name("kiln"));
    Driver::Postgres(pool)
}
