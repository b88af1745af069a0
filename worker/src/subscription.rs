//! Follows one queue, over lost connections, and hands its deliveries on.

use std::convert::Infallible;

use farm::broker::{Consumer, SharedBroker};
use farm::message::QueueKey;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::context::Backoff;
use crate::holdings::Receipt;
use crate::intake::Arrival;

/// Subscribes, again whenever the subscription is lost, until `stop`. Then asks for no more, gives back
/// what nobody has taken, and keeps the subscription until every receipt of it is settled, since
/// dropping it would hand those deliveries to others.
pub(crate) async fn run(
    broker: SharedBroker,
    queue: QueueKey,
    prefetch: u16,
    arrivals: mpsc::Sender<Arrival>,
    stop: CancellationToken,
) {
    let mut pause = Backoff::default();
    loop {
        let Some(subscribed) = stop.run_until_cancelled(broker.consume(&queue, prefetch)).await else { return };
        match subscribed {
            Ok(consumer) => {
                pause = Backoff::default();
                if follow(consumer, &queue, &arrivals, &stop).await.is_stopped() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(model = queue.model, lane = queue.lane.as_str(), %error, "could not subscribe: trying again");
            }
        }
        if stop.run_until_cancelled(pause.rest()).await.is_none() {
            return;
        }
    }
}

enum End {
    Stopped,
    Lost,
}

impl End {
    fn is_stopped(&self) -> bool {
        matches!(self, Self::Stopped)
    }
}

async fn follow(
    mut consumer: Box<dyn Consumer>,
    queue: &QueueKey,
    arrivals: &mpsc::Sender<Arrival>,
    stop: &CancellationToken,
) -> End {
    let acker = consumer.acker();
    let (keep, mut kept) = mpsc::channel::<Infallible>(1);
    while let Some(next) = stop.run_until_cancelled(consumer.next()).await {
        match next {
            Ok(Some(delivery)) => {
                let tag = delivery.tag;
                let receipt = Receipt { acker: acker.clone(), tag, _subscription: keep.clone() };
                if let Err(refused) = arrivals.send(Arrival { delivery, receipt }).await {
                    refused.0.receipt.give_back().await;
                    break;
                }
            }
            Ok(None) => break,
            Err(error) => {
                let (model, lane) = (&queue.model, queue.lane.as_str());
                tracing::warn!(model, lane, %error, "the subscription was lost: leases in hand stay valid");
                return End::Lost;
            }
        }
    }
    if consumer.stop().await.is_ok() {
        while let Ok(Some(delivery)) = consumer.next().await {
            let receipt = Receipt { acker: acker.clone(), tag: delivery.tag, _subscription: keep.clone() };
            receipt.give_back().await;
        }
    }
    drop(keep);
    let _settled = kept.recv().await;
    End::Stopped
}
