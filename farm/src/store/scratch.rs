//! Databases for a bench or a test: made empty beside an existing one on Postgres, and removed again.

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use super::error::from_driver;
use super::schema::Address;
use super::{Result, StoreError};

/// The address of database `name` on the server of `server`, which is the address of another database there.
pub fn url_of(server: &str, name: &str) -> String {
    let (address, parameters) = server.find('?').map_or((server, ""), |at| server.split_at(at));
    let authority = address.find("://").map_or(0, |at| at + "://".len());
    let end = address[authority..].find('/').map_or(address.len(), |at| authority + at);
    format!("{}/{name}{parameters}", &address[..end])
}

/// Makes an empty database. `server` is the address of another one there, whose user may make databases.
pub async fn create(server: &str, name: &str) -> Result<()> {
    run(server, name, format!("/* create scratch */ CREATE DATABASE \"{name}\"")).await
}

/// Removes a database and breaks every connection to it; it is fine if there is none.
pub async fn remove(server: &str, name: &str) -> Result<()> {
    run(server, name, format!("/* remove scratch */ DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)")).await
}

/// Runs a statement that holds `name` as an identifier: what cannot be one without escapes is refused.
async fn run(server: &str, name: &str, statement: String) -> Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if name.is_empty() || name.len() > 63 || !name.chars().all(plain) {
        let limit = "a scratch database's name must be 1 to 63 lower-case letters, digits and `_`";
        return Err(StoreError::Internal(format!("{limit}, but is `{name}`").into()));
    }
    let Address::Postgres(options) = server.parse()? else {
        return Err(StoreError::Internal("a scratch database needs a Postgres server, a SQLite one is a file".into()));
    };
    let mut connection = PgConnectOptions::connect(&options).await.map_err(from_driver)?;
    sqlx::query(AssertSqlSafe(statement)).execute(&mut connection).await.map_err(from_driver)?;
    connection.close().await.map_err(from_driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_databases_name_is_exchanged() {
        assert_eq!(url_of("postgres://me:pw@db:5433/kiln", "x"), "postgres://me:pw@db:5433/x");
        assert_eq!(url_of("postgres://db", "x"), "postgres://db/x");
        let socket = "postgres:///kiln?host=/run/postgresql&sslmode=disable";
        assert_eq!(url_of(socket, "x"), "postgres:///x?host=/run/postgresql&sslmode=disable");
    }

    #[tokio::test]
    async fn a_name_that_needs_escapes_and_a_file_are_refused() {
        for name in ["", "Kiln", "a\"; DROP TABLE jobs; --", &"x".repeat(64)] {
            let error = create("postgres://db/kiln", name).await.unwrap_err().to_string();
            assert!(error.contains("1 to 63 lower-case letters"), "{error}");
        }
        let error = create("sqlite:kiln.db", "x").await.unwrap_err().to_string();
        assert!(error.contains("needs a Postgres server"), "{error}");
    }
}
