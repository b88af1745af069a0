//! The listening socket and its connections: HTTP/1.1, bounded in number, closed politely.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Connections at once; further ones wait to be accepted.
const CONNECTIONS: usize = 4096;
/// A client must have sent its request's head within this time, and may idle for as long between requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// A pause after a connection could not be accepted (most likely no file descriptors are left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves until `stop`; then accepts no more and gives open requests `grace` to end.
pub(crate) async fn serve(listener: TcpListener, router: Router, stop: CancellationToken, grace: Duration) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &permits) => {
                let (socket, permit) = accepted;
                let connection = serve_connection(socket, router.clone(), stop.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Some(_ended) = connections.join_next() => {}
        }
    }
    drop(listener);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(grace, all_ended).await.is_err() {
        warn!(connections = connections.len(), "requests were still open when the time for an orderly stop was over");
        connections.shutdown().await;
    }
}

async fn accept(listener: &TcpListener, permits: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
    let permit = Arc::clone(permits).acquire_owned().await.expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((socket, _)) => return (socket, permit),
            Err(error) => {
                warn!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(socket: TcpStream, router: Router, stop: CancellationToken) {
    // Progress events are small and should not wait for each other.
    if let Err(error) = socket.set_nodelay(true) {
        debug!("cannot set TCP_NODELAY: {error}");
    }
    let service = TowerToHyperService::new(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(socket), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        // A client that went away; what it asked for has its own log line.
        debug!("a connection broke: {error}");
    }
}
