//! The two databases behind one face: a statement in both dialects, and what runs it.
//!
//! The dialects differ where `{"for Postgres" | "for SQLite"}` stands in a [`statement!`], in the fragments
//! below, and nowhere else: rows are locked on Postgres, while on SQLite a writing transaction is alone
//! anyway; lists come as one JSON parameter, which each unpacks with its own function.

use std::time::Duration;

use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArguments, PgPool, PgRow, Postgres};
use sqlx::sqlite::{Sqlite, SqliteArguments, SqlitePool, SqliteRow};
use sqlx::{Encode, FromRow, Type};

use super::error::from_driver;
use super::{Result, StoreError};

/// How long an ordinary statement may take before the database counts as dead.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a statement over a whole submission may take.
const BULK_PATIENCE: Duration = Duration::from_secs(3600);

/// A statement in both dialects. Opens with its name as a comment, for the database's logs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Statement {
    pub(super) postgres: &'static str,
    pub(super) sqlite: &'static str,
    pub(super) patience: Duration,
}

impl Statement {
    pub(super) const fn new(postgres: &'static str, sqlite: &'static str) -> Self {
        Self { postgres, sqlite, patience: PATIENCE }
    }

    /// The same, for as many rows as a submission has.
    pub(super) const fn bulk(self) -> Self {
        Self { patience: BULK_PATIENCE, ..self }
    }
}

/// A [`Statement`] of pieces: text that both dialects share, `{"Postgres's" | "SQLite's"}` where they
/// differ, and names of fragments: macros that give the text for a dialect.
macro_rules! statement {
    ($($piece:tt),+ $(,)?) => {
        $crate::store::driver::Statement::new(
            concat!($($crate::store::driver::piece!(postgres $piece)),+),
            concat!($($crate::store::driver::piece!(sqlite $piece)),+),
        )
    };
}

macro_rules! piece {
    (postgres { $postgres:literal | $sqlite:literal }) => {
        $postgres
    };
    (sqlite { $postgres:literal | $sqlite:literal }) => {
        $sqlite
    };
    ($dialect:ident $shared:literal) => {
        $shared
    };
    ($dialect:ident $fragment:ident) => {
        $fragment!($dialect)
    };
}

/// The ids in `$1`.
macro_rules! given_ids {
    (postgres) => {
        "(SELECT value::uuid FROM jsonb_array_elements_text($1::jsonb))"
    };
    (sqlite) => {
        "(SELECT value FROM json_each($1))"
    };
}

/// The leases in `$1`, as rows of `given`.
macro_rules! given_leases {
    (postgres) => {
        "jsonb_to_recordset($1::jsonb) AS given(job_id uuid, token uuid)"
    };
    (sqlite) => {
        "(SELECT value ->> 'job_id' AS job_id, value ->> 'token' AS token FROM json_each($1)) AS given"
    };
}

/// The jobs that wait, read by the index that holds no others. SQLite keeps no statistics that would let
/// it find that out, so it is told.
macro_rules! waiting_jobs {
    (postgres) => {
        "jobs WHERE jobs.state IN ('pending', 'queued')"
    };
    (sqlite) => {
        "jobs INDEXED BY jobs_waiting WHERE jobs.state IN ('pending', 'queued')"
    };
}

pub(super) use {given_ids, given_leases, piece, statement, waiting_jobs};

/// A parameter that both databases take.
pub(super) trait Argument: Send {
    fn add_to_postgres(self: Box<Self>, arguments: &mut PgArguments) -> Result<(), BoxDynError>;
    fn add_to_sqlite(self: Box<Self>, arguments: &mut SqliteArguments) -> Result<(), BoxDynError>;
}

impl<T> Argument for T
where
    T: Send + 'static + Type<Postgres> + Type<Sqlite>,
    for<'q> T: Encode<'q, Postgres> + Encode<'q, Sqlite>,
{
    fn add_to_postgres(self: Box<Self>, arguments: &mut PgArguments) -> Result<(), BoxDynError> {
        sqlx::Arguments::add(arguments, *self)
    }

    fn add_to_sqlite(self: Box<Self>, arguments: &mut SqliteArguments) -> Result<(), BoxDynError> {
        sqlx::Arguments::add(arguments, *self)
    }
}

/// The parameters `$1, $2, …` of a statement.
pub(super) type Arguments = Vec<Box<dyn Argument>>;

/// The parameters `$1, $2, …` of a statement.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => {
        vec![$(Box::new($value) as Box<dyn $crate::store::driver::Argument>),*]
    };
}

pub(super) use arguments;

/// A row that both databases can give.
pub(super) trait Record:
    for<'r> FromRow<'r, PgRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin + 'static
{
}

impl<T> Record for T where T: for<'r> FromRow<'r, PgRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin + 'static {}

fn for_postgres(arguments: Arguments) -> Result<PgArguments> {
    let mut all = PgArguments::default();
    for argument in arguments {
        argument.add_to_postgres(&mut all).map_err(StoreError::Internal)?;
    }
    Ok(all)
}

fn for_sqlite(arguments: Arguments) -> Result<SqliteArguments> {
    let mut all = SqliteArguments::default();
    for argument in arguments {
        argument.add_to_sqlite(&mut all).map_err(StoreError::Internal)?;
    }
    Ok(all)
}

/// Waits for the database no longer than `patience`.
pub(super) async fn bounded<T>(patience: Duration, work: impl Future<Output = sqlx::Result<T>>) -> Result<T> {
    match tokio::time::timeout(patience, work).await {
        Ok(outcome) => outcome.map_err(from_driver),
        Err(_) => Err(StoreError::Unavailable(format!("the database has not answered for {patience:?}").into())),
    }
}

/// Where statements run.
#[derive(Clone, Debug)]
pub(super) enum Driver {
    /// A server.
    Postgres(PgPool),
    /// A file: one connection writes, the others read beside it.
    Sqlite { writer: SqlitePool, readers: SqlitePool },
}

impl Driver {
    /// True for the database whose writers run one after another.
    pub(super) fn has_one_writer(&self) -> bool {
        matches!(self, Self::Sqlite { .. })
    }

    /// Begins a transaction that may write.
    pub(super) async fn begin(&self) -> Result<Transaction> {
        match self {
            Self::Postgres(pool) => bounded(PATIENCE, pool.begin()).await.map(Transaction::Postgres),
            // The pool's own limit bounds the wait for the one writer.
            Self::Sqlite { writer, .. } => {
                bounded(BULK_PATIENCE, writer.begin_with("BEGIN IMMEDIATE")).await.map(Transaction::Sqlite)
            }
        }
    }

    /// Reads rows outside of any transaction.
    pub(super) async fn fetch<T: Record>(&self, statement: &Statement, arguments: Arguments) -> Result<Vec<T>> {
        match self {
            Self::Postgres(pool) => {
                let query = sqlx::query_as_with::<Postgres, T, _>(statement.postgres, for_postgres(arguments)?);
                bounded(statement.patience, query.fetch_all(pool)).await
            }
            Self::Sqlite { readers, .. } => {
                let query = sqlx::query_as_with::<Sqlite, T, _>(statement.sqlite, for_sqlite(arguments)?);
                bounded(statement.patience, query.fetch_all(readers)).await
            }
        }
    }

    /// Reads at most one row outside of any transaction.
    pub(super) async fn fetch_optional<T: Record>(
        &self,
        statement: &Statement,
        arguments: Arguments,
    ) -> Result<Option<T>> {
        Ok(self.fetch(statement, arguments).await?.pop())
    }
}

/// A transaction that may write; rolled back when dropped.
pub(super) enum Transaction {
    Postgres(sqlx::Transaction<'static, Postgres>),
    Sqlite(sqlx::Transaction<'static, Sqlite>),
}

impl Transaction {
    /// Runs a statement; how many rows it changed.
    pub(super) async fn execute(&mut self, statement: &Statement, arguments: Arguments) -> Result<u64> {
        match self {
            Self::Postgres(transaction) => {
                let query = sqlx::query_with::<Postgres, _>(statement.postgres, for_postgres(arguments)?);
                Ok(bounded(statement.patience, query.execute(&mut **transaction)).await?.rows_affected())
            }
            Self::Sqlite(transaction) => {
                let query = sqlx::query_with::<Sqlite, _>(statement.sqlite, for_sqlite(arguments)?);
                Ok(bounded(statement.patience, query.execute(&mut **transaction)).await?.rows_affected())
            }
        }
    }

    /// Runs a statement that gives rows.
    pub(super) async fn fetch<T: Record>(&mut self, statement: &Statement, arguments: Arguments) -> Result<Vec<T>> {
        match self {
            Self::Postgres(transaction) => {
                let query = sqlx::query_as_with::<Postgres, T, _>(statement.postgres, for_postgres(arguments)?);
                bounded(statement.patience, query.fetch_all(&mut **transaction)).await
            }
            Self::Sqlite(transaction) => {
                let query = sqlx::query_as_with::<Sqlite, T, _>(statement.sqlite, for_sqlite(arguments)?);
                bounded(statement.patience, query.fetch_all(&mut **transaction)).await
            }
        }
    }

    /// Runs a statement that gives at most one row.
    pub(super) async fn fetch_optional<T: Record>(
        &mut self,
        statement: &Statement,
        arguments: Arguments,
    ) -> Result<Option<T>> {
        Ok(self.fetch(statement, arguments).await?.pop())
    }

    /// Makes it all true.
    pub(super) async fn commit(self) -> Result<()> {
        match self {
            Self::Postgres(transaction) => bounded(PATIENCE, transaction.commit()).await,
            Self::Sqlite(transaction) => bounded(PATIENCE, transaction.commit()).await,
        }
    }
}

/// A list as the one JSON parameter that statements unpack.
pub(super) fn json_list<T: serde::Serialize>(items: &[T]) -> String {
    serde_json::to_string(items).expect("ids, words and numbers can be written as JSON")
}
