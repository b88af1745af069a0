//! SQLite: the store of one machine, a file. One connection writes, so transactions queue here
//! instead of failing as busy; readers see the last commit and wait for nobody.

use std::str::FromStr;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection};

use super::driver::Driver;
use super::error::from_driver;
use super::{Result, StoreError, StoreSettings, schema};

/// How long to wait for the one writer: a submission of a million jobs may hold it for half a minute.
const ACQUIRE_WRITER: Duration = Duration::from_secs(120);

/// How long to wait for a reader.
const ACQUIRE_READER: Duration = Duration::from_secs(10);

/// How long to wait for a writer in another process.
const BUSY: Duration = Duration::from_secs(30);

/// Reads `sqlite:PATH` or `sqlite::memory:`.
pub(super) fn options(url: &str) -> Result<SqliteConnectOptions> {
    let options = SqliteConnectOptions::from_str(url).map_err(from_driver)?;
    Ok(options
        .create_if_missing(true)
        .foreign_keys(true)
        .journal_mode(SqliteJournalMode::Wal)
        // An accepted submission survives a power cut, not only a crash: each commit waits for the disk.
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY)
        .pragma("cache_size", "-65536")
        .pragma("temp_store", "MEMORY"))
}

/// True for a database that is no file: it lives as long as its one connection.
fn is_in_memory(options: &SqliteConnectOptions) -> bool {
    let name = options.get_filename().to_string_lossy();
    name.contains(":memory:") || name.contains("sqlx-in-memory")
}

/// Opens one connection, creating the file and its folder if need be.
pub(super) async fn connect(options: &SqliteConnectOptions) -> Result<SqliteConnection> {
    if !is_in_memory(options)
        && let Some(folder) = options.get_filename().parent()
    {
        tokio::fs::create_dir_all(folder)
            .await
            .map_err(|error| StoreError::Internal(format!("cannot create {}: {error}", folder.display()).into()))?;
    }
    options.connect().await.map_err(from_driver)
}

/// Opens the pools and brings the schema up to date.
pub(super) async fn open(options: SqliteConnectOptions, settings: &StoreSettings) -> Result<Driver> {
    let in_memory = is_in_memory(&options);
    if !in_memory {
        let mut connection = connect(&options).await?;
        schema::migrate_sqlite(&mut connection).await?;
        connection.close().await.map_err(from_driver)?;
    }
    let writer = SqlitePoolOptions::new()
        .max_connections(1)
        .min_connections(1)
        .idle_timeout(None)
        .max_lifetime(None)
        .acquire_timeout(ACQUIRE_WRITER)
        .connect_with(options.clone())
        .await
        .map_err(from_driver)?;
    let readers = if in_memory {
        schema::migrate_sqlite(&mut *writer.acquire().await.map_err(from_driver)?).await?;
        writer.clone()
    } else {
        SqlitePoolOptions::new()
            .max_connections(settings.connections.max(1))
            .acquire_timeout(ACQUIRE_READER)
            // There may be many readers, and the system caches the file for all of them.
            .connect_lazy_with(options.pragma("query_only", "ON").pragma("cache_size", "-4096"))
    };
    Ok(Driver::Sqlite { writer, readers })
}
