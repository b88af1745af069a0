//! How the farm's own types stand in columns: the same Rust type on both databases, so that rows are
//! read and written by the same code.
//!
//! | type | Postgres | SQLite |
//! |---|---|---|
//! | ids | uuid | text |
//! | words (states, lanes, kinds) | text | text |
//! | times | timestamptz | microseconds since 1970 |

use chrono::{DateTime, Utc};
use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::PgTypeInfo;
use sqlx::sqlite::SqliteTypeInfo;
use sqlx::{Database, Decode, Encode, Postgres, Sqlite, Type};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use crate::id::{JobId, LeaseToken, SubmissionId};
use crate::job::{FailureKind, JobState, Lane};

type ArgumentBuffer<D> = <D as Database>::ArgumentBuffer;
type ValueRef<'r, D> = <D as Database>::ValueRef<'r>;

/// A type that travels as `$postgres` on Postgres and as `$sqlite` on SQLite.
macro_rules! column {
    ($type:ty, $postgres:ty, $sqlite:ty, $write_postgres:expr, $write_sqlite:expr, $read_postgres:expr, $read_sqlite:expr) => {
        column!(@one $type, Postgres, PgTypeInfo, $postgres, $write_postgres, $read_postgres);
        column!(@one $type, Sqlite, SqliteTypeInfo, $sqlite, $write_sqlite, $read_sqlite);
    };
    (@one $type:ty, $database:ty, $info:ty, $inner:ty, $write:expr, $read:expr) => {
        impl Type<$database> for $type {
            fn type_info() -> $info {
                <$inner as Type<$database>>::type_info()
            }

            fn compatible(info: &$info) -> bool {
                <$inner as Type<$database>>::compatible(info)
            }
        }

        impl Encode<'_, $database> for $type {
            fn encode_by_ref(&self, buffer: &mut ArgumentBuffer<$database>) -> Result<IsNull, BoxDynError> {
                let write: fn(&$type) -> $inner = $write;
                Encode::<$database>::encode(write(self), buffer)
            }
        }

        impl<'r> Decode<'r, $database> for $type {
            fn decode(value: ValueRef<'r, $database>) -> Result<Self, BoxDynError> {
                let read: fn($inner) -> Result<$type, BoxDynError> = $read;
                read(<$inner as Decode<$database>>::decode(value)?)
            }
        }
    };
}

macro_rules! id_columns {
    ($($type:ident),*) => {
        $(column!(
            $type, Uuid, Hyphenated,
            |id| id.0, |id| id.0.hyphenated(),
            |uuid| Ok($type(uuid)), |text| Ok($type(text.into_uuid()))
        );)*
    };
}

id_columns!(JobId, SubmissionId, LeaseToken);

macro_rules! word_columns {
    ($($type:ident),*) => {
        $(column!(
            $type, String, String,
            |word| word.as_str().to_owned(), |word| word.as_str().to_owned(),
            |text| read_word(&text, $type::parse(&text)), |text| read_word(&text, $type::parse(&text))
        );)*
    };
}

word_columns!(JobState, Lane, FailureKind);

fn read_word<T>(text: &str, word: Option<T>) -> Result<T, BoxDynError> {
    word.ok_or_else(|| format!("the store holds an unknown {}: `{text}`", std::any::type_name::<T>()).into())
}

/// A time, to the microsecond: what both databases can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(pub(super) DateTime<Utc>);

column!(
    Moment,
    DateTime<Utc>,
    i64,
    |moment| moment.0,
    |moment| moment.0.timestamp_micros(),
    |time| Ok(Moment(time)),
    |micros| {
        let time = DateTime::from_timestamp_micros(micros);
        time.map(Moment).ok_or_else(|| format!("the store holds an impossible time: {micros} µs").into())
    }
);
