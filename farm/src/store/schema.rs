//! Migrations: embedded in the binary, run under a lock, and checked before the store is used.

use std::str::FromStr;
use std::time::Duration;

use sqlx::migrate::{Migrate, MigrateError, Migrator};
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};

use super::driver::{Driver, Statement, arguments, bounded, statement};
use super::error::{from_driver, from_migrator, is_missing_table};
use super::{Result, StoreError, sqlite};

static POSTGRES: Migrator = sqlx::migrate!("../migrations/postgres");
static SQLITE: Migrator = sqlx::migrate!("../migrations/sqlite");

/// How long a server may take to let us in.
const CONNECT: Duration = Duration::from_secs(10);

/// Tries again when another process has been migrating the same SQLite file: that database has no
/// lock to hold over several transactions.
const SQLITE_ATTEMPTS: u32 = 5;

/// A store's address, read.
pub(super) enum Address {
    Postgres(PgConnectOptions),
    Sqlite(SqliteConnectOptions),
}

impl FromStr for Address {
    type Err = StoreError;

    fn from_str(url: &str) -> Result<Self> {
        // The address may hold a password: errors name its scheme only.
        match url.split_once(':') {
            Some(("postgres" | "postgresql", _)) => url.parse().map(Self::Postgres).map_err(from_driver),
            Some(("sqlite", _)) => sqlite::options(url).map(Self::Sqlite),
            scheme => {
                let scheme = scheme.map_or("an address without a scheme", |(scheme, _)| scheme);
                let limit = "the store's URL must begin with `postgres://`, `postgresql://` or `sqlite:`";
                Err(StoreError::Internal(format!("{limit}, but begins with `{scheme}`").into()))
            }
        }
    }
}

/// Brings a store's schema to this build's version, creating it if there is none. Several processes may
/// do it at once.
pub async fn migrate(url: &str) -> Result<()> {
    match url.parse()? {
        Address::Postgres(options) => {
            // A connection of its own: if a migration fails, the lock goes with it.
            let mut connection = bounded(CONNECT, options.connect()).await?;
            let outcome = run(&POSTGRES, &mut connection).await;
            connection.close().await.map_err(from_driver)?;
            outcome
        }
        Address::Sqlite(options) => {
            let mut connection = sqlite::connect(&options).await?;
            migrate_sqlite(&mut connection).await?;
            connection.close().await.map_err(from_driver)
        }
    }
}

/// The same over an open connection (an in-memory database has only the one).
pub(super) async fn migrate_sqlite(connection: &mut sqlx::SqliteConnection) -> Result<()> {
    let mut attempt = 1;
    loop {
        match run(&SQLITE, connection).await {
            Err(error) if attempt < SQLITE_ATTEMPTS && !matches!(error, StoreError::Schema { .. }) => {
                tracing::debug!(attempt, %error, "could not migrate, perhaps another process does");
                tokio::time::sleep(Duration::from_millis(50 << attempt)).await;
                attempt += 1;
            }
            outcome => return outcome,
        }
    }
}

async fn run<C>(migrator: &Migrator, connection: &mut C) -> Result<()>
where
    C: Migrate,
{
    migrator.run_direct(None, connection, false).await.map_err(|error| from_migrator(error, newest(migrator)))
}

/// Takes migrations back until the schema is at version `to`; 0 leaves nothing.
pub async fn revert(url: &str, to: i64) -> Result<()> {
    let failed = |error: MigrateError| from_migrator(error, to);
    match url.parse()? {
        Address::Postgres(options) => {
            let mut connection = bounded(CONNECT, options.connect()).await?;
            POSTGRES.undo(&mut connection, to).await.map_err(failed)?;
            connection.close().await.map_err(from_driver)
        }
        Address::Sqlite(options) => {
            let mut connection = sqlite::connect(&options).await?;
            SQLITE.undo(&mut connection, to).await.map_err(failed)?;
            connection.close().await.map_err(from_driver)
        }
    }
}

const SCHEMA_VERSION: Statement = statement!(
    "-- schema_version()
    SELECT CAST(coalesce(max(version), 0) AS bigint) FROM _sqlx_migrations WHERE success"
);

/// Fails unless the schema is this build's.
pub(super) async fn check(driver: &Driver) -> Result<()> {
    let needed = newest(if driver.has_one_writer() { &SQLITE } else { &POSTGRES });
    let found = match driver.fetch_optional::<(i64,)>(&SCHEMA_VERSION, arguments![]).await {
        Ok(version) => version.map_or(0, |(version,)| version),
        Err(error) if is_missing_table(&error) => 0,
        Err(error) => return Err(error),
    };
    if found == needed { Ok(()) } else { Err(StoreError::Schema { found, needed }) }
}

fn newest(migrator: &Migrator) -> i64 {
    migrator.iter().map(|migration| migration.version).max().unwrap_or(0)
}
