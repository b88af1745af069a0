//! The store's conformance suite: each sentence runs on SQLite and on Postgres, in a database of its
//! own, with a clock that stands still until it is told to move.

mod attempts;
mod cancelling;
mod claiming;
mod counting;
mod dispatching;
mod failing;
mod fleet;
mod harness;
mod listing;
mod schema;
mod submitting;
mod sweeping;

use harness::TestFarm;

/// Runs each test on both stores.
macro_rules! on_each_store {
    ($($(#[$attribute:meta])* async fn $name:ident($farm:ident: &TestFarm) $body:block)*) => {
        $(
            $(#[$attribute])*
            async fn $name($farm: &$crate::store::TestFarm) $body

            mod $name {
                #[test]
                fn sqlite() {
                    $crate::store::harness::on_sqlite(async |farm| super::$name(farm).await);
                }

                #[test]
                fn postgres() {
                    $crate::store::harness::on_postgres(async |farm| super::$name(farm).await);
                }
            }
        )*
    };
}

use on_each_store;
