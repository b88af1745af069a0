//! What the drivers report, as [`StoreError`]: SQLSTATEs and SQLite's result codes are known here and
//! nowhere else.

use sqlx::migrate::MigrateError;
use sqlx::sqlite::SqliteError;

use super::StoreError;

/// Two transactions waited for each other; this one was chosen to give way.
const DEADLOCK_DETECTED: &str = "40P01";
/// A concurrent change got in between.
const SERIALIZATION_FAILURE: &str = "40001";
/// The server has no room left on its disk.
const DISK_FULL: &str = "53100";
/// There is no such table: nothing has been migrated yet.
const UNDEFINED_TABLE: &str = "42P01";
/// SQLSTATEs, or classes of them, that time will mend: connection exceptions, insufficient resources,
/// the operator's interventions (a shutdown), lock timeouts, a standby before its promotion.
const PASSING: [&str; 5] = ["08", "53", "57", "55P03", "25006"];

/// SQLite's primary result codes: busy, locked, cannot open.
const SQLITE_PASSING: [i32; 3] = [5, 6, 14];
/// SQLite's primary result code for a full disk.
const SQLITE_FULL: i32 = 13;

pub(super) fn from_driver(error: sqlx::Error) -> StoreError {
    match &error {
        sqlx::Error::Database(_) => from_server(error),
        sqlx::Error::Io(cause) if cause.kind() == std::io::ErrorKind::StorageFull => StoreError::Full(error.into()),
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => StoreError::Unavailable(error.into()),
        _ => StoreError::Internal(error.into()),
    }
}

fn from_server(error: sqlx::Error) -> StoreError {
    if let Some(code) = sqlite_code(&error) {
        return match code {
            SQLITE_FULL => StoreError::Full(error.into()),
            code if SQLITE_PASSING.contains(&code) => StoreError::Unavailable(error.into()),
            _ => StoreError::Internal(error.into()),
        };
    }
    match sqlstate(&error).as_deref() {
        Some(DISK_FULL) => StoreError::Full(error.into()),
        Some(DEADLOCK_DETECTED | SERIALIZATION_FAILURE) => StoreError::Unavailable(error.into()),
        Some(code) if PASSING.iter().any(|passing| code.starts_with(passing)) => StoreError::Unavailable(error.into()),
        _ => StoreError::Internal(error.into()),
    }
}

/// An error of the migrator; `needed` is this build's version.
pub(super) fn from_migrator(error: MigrateError, needed: i64) -> StoreError {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => from_driver(error),
        // The store has migrations that this build does not know: it is newer.
        MigrateError::VersionMissing(found) => StoreError::Schema { found, needed },
        other => StoreError::Internal(other.into()),
    }
}

/// True if the transaction gave way to another and may just be run again.
pub(super) fn is_conflict(error: &StoreError) -> bool {
    let StoreError::Unavailable(cause) = error else { return false };
    let Some(error) = cause.downcast_ref::<sqlx::Error>() else { return false };
    matches!(sqlstate(error).as_deref(), Some(DEADLOCK_DETECTED | SERIALIZATION_FAILURE))
}

/// True if the statement named a table that does not exist.
pub(super) fn is_missing_table(error: &StoreError) -> bool {
    let StoreError::Internal(cause) = error else { return false };
    let Some(error) = cause.downcast_ref::<sqlx::Error>() else { return false };
    match sqlite_code(error) {
        // SQLite has no code of its own for it.
        Some(_) => error.to_string().contains("no such table"),
        None => sqlstate(error).as_deref() == Some(UNDEFINED_TABLE),
    }
}

fn sqlstate(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(|code| code.into_owned())
}

/// The primary result code, if it is SQLite's error.
fn sqlite_code(error: &sqlx::Error) -> Option<i32> {
    let error = error.as_database_error()?.try_downcast_ref::<SqliteError>()?;
    let extended: i32 = sqlx::error::DatabaseError::code(error)?.parse().ok()?;
    Some(extended & 0xff)
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection, Executor, SqliteConnection};

    use super::*;

    async fn sqlite(url: &str) -> SqliteConnection {
        SqliteConnection::connect(url).await.unwrap()
    }

    #[tokio::test]
    async fn a_database_that_may_not_grow_is_full() {
        let mut connection = sqlite("sqlite::memory:").await;
        connection.execute("PRAGMA max_page_count = 3; CREATE TABLE some (bytes BLOB)").await.unwrap();
        let error = connection.execute("INSERT INTO some VALUES (zeroblob(100000))").await.unwrap_err();
        assert!(matches!(from_driver(error), StoreError::Full(_)));
    }

    #[tokio::test]
    async fn a_file_that_another_writes_is_unavailable() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}?mode=rwc", folder.path().join("some.db").display());
        let (mut one, mut two) = (sqlite(&url).await, sqlite(&url).await);
        two.execute("PRAGMA busy_timeout = 0").await.unwrap();
        one.execute("BEGIN IMMEDIATE").await.unwrap();
        let error = from_driver(two.execute("BEGIN IMMEDIATE").await.unwrap_err());
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        assert!(!is_conflict(&error));
    }

    #[tokio::test]
    async fn a_broken_rule_is_internal_and_so_is_a_missing_table() {
        let mut connection = sqlite("sqlite::memory:").await;
        connection.execute("CREATE TABLE some (id INTEGER CHECK (id > 0))").await.unwrap();
        let broken = from_driver(connection.execute("INSERT INTO some VALUES (0)").await.unwrap_err());
        assert!(matches!(broken, StoreError::Internal(_)) && !is_missing_table(&broken), "{broken:?}");
        let missing = from_driver(connection.execute("SELECT * FROM other").await.unwrap_err());
        assert!(is_missing_table(&missing), "{missing:?}");
    }

    #[test]
    fn a_pool_without_a_free_connection_is_unavailable() {
        assert!(matches!(from_driver(sqlx::Error::PoolTimedOut), StoreError::Unavailable(_)));
    }

    #[test]
    fn a_newer_schema_is_named_with_both_versions() {
        let error = from_migrator(MigrateError::VersionMissing(7), 3);
        assert!(matches!(error, StoreError::Schema { found: 7, needed: 3 }));
    }
}
