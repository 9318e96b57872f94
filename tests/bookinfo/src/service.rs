//! The services: small, real, and dependent on their addresses alone.
//!
//! A service finds those it calls by `WEFT_<SERVICE>_<POLICY>_ADDR` and by nothing else. It answers 200 only
//! if all of its own calls did.

use std::{
    env,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context, Result};
use axum::{
    Json, Router,
    extract::{ConnectInfo, State, connect_info::Connected},
    http::{HeaderName, StatusCode, Uri, header},
    routing::get,
    serve::IncomingStream,
};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

use crate::{
    answer::{Answer, Server},
    fetch,
    role::ServiceArgs,
};

const REVIEWS: [&str; 3] = ["reviews-v1", "reviews-v2", "reviews-v3"];

/// Whom a service calls for each request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Calls {
    /// Nobody.
    Nobody,
    /// Ratings.
    Ratings,
    /// Details, and the reviews in turn.
    Page,
}

#[derive(Debug)]
struct Service {
    server: Server,
    content: Value,
    calls: Calls,
    args: ServiceArgs,
    turn: AtomicUsize,
}

/// The address on which a request arrived.
#[derive(Clone, Copy, Debug)]
struct Arrived(Option<SocketAddr>);

impl Connected<IncomingStream<'_, TcpListener>> for Arrived {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        Self(stream.io().local_addr().ok().map(unmapped))
    }
}

/// Serves until SIGTERM, then finishes what is under way.
pub(crate) async fn serve(
    name: &str,
    version: Option<&str>,
    calls: Calls,
    args: ServiceArgs,
) -> Result<()> {
    let full = version.map_or_else(|| name.to_owned(), |version| format!("{name}-{version}"));
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, args.port));
    let service = Arc::new(Service {
        server: Server::this(full),
        content: content(name),
        calls,
        args,
        turn: AtomicUsize::new(0),
    });
    let app = Router::new()
        .route(&format!("/{name}"), get(answer))
        .with_state(service);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("failed to bind to {address}"))?;
    let mut stop = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    axum::serve(
        listener,
        app.into_make_service_with_connect_info::<Arrived>(),
    )
    .with_graceful_shutdown(async move {
        stop.recv().await;
    })
    .await
    .context("failed to serve")
}

/// Waits for SIGTERM.
pub(crate) async fn idle() -> Result<()> {
    let mut stop = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    stop.recv().await;
    Ok(())
}

async fn answer(
    State(service): State<Arc<Service>>,
    ConnectInfo(Arrived(address)): ConnectInfo<Arrived>,
) -> (StatusCode, [(HeaderName, &'static str); 1], Json<Answer>) {
    let results = match service.calls {
        Calls::Nobody => vec![],
        Calls::Ratings => vec![service.call("ratings", "ratings").await],
        Calls::Page => {
            let turn = service.turn.fetch_add(1, Ordering::Relaxed);
            let reviews = service.call(REVIEWS[turn % REVIEWS.len()], "reviews");
            let (details, reviews) = tokio::join!(service.call("details", "details"), reviews);
            vec![details, reviews]
        }
    };
    let mut answer = Answer {
        server: Server {
            address,
            ..service.server.clone()
        },
        content: service.content.clone(),
        calls: vec![],
        failures: vec![],
    };
    for result in results {
        match result {
            Ok(call) => answer.calls.push(call),
            Err(failure) => answer.failures.push(failure),
        }
    }
    let status = if answer.failures.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::BAD_GATEWAY
    };
    (status, [(header::CONNECTION, "close")], Json(answer))
}

impl Service {
    async fn call(&self, service: &str, path: &str) -> Result<Answer, String> {
        let variable = variable(service, &self.args.policy);
        let address: IpAddr = env::var(&variable)
            .map_err(|error| format!("{service}: {variable}: {error}"))?
            .parse()
            .map_err(|error| format!("{service}: {variable}: {error}"))?;
        let url: Uri = format!(
            "http://{}/{path}",
            SocketAddr::from((address, self.args.port))
        )
        .parse()
        .map_err(|error| format!("{service}: {error}"))?;
        fetch::fetch(&url)
            .await
            .map_err(|failure| format!("{service}: {failure}"))
    }
}

/// Where the environment holds a service's VIP of a policy.
fn variable(service: &str, policy: &str) -> String {
    format!("WEFT_{service}_{policy}_ADDR")
        .replace('-', "_")
        .to_uppercase()
}

/// An IPv4 address that a dual-stack socket shows as IPv6, as itself.
fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn content(name: &str) -> Value {
    match name {
        "productpage" => json!({ "title": "The Comedy of Errors" }),
        "details" => json!({ "author": "William Shakespeare", "year": 1595, "pages": 200 }),
        "reviews" => json!({ "reviews": ["An extremely entertaining play.", "Absolutely fun."] }),
        _ => json!({ "stars": [5, 4] }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_looked_up_by_service_and_policy() {
        assert_eq!(
            variable("reviews-v2", "least_loaded"),
            "WEFT_REVIEWS_V2_LEAST_LOADED_ADDR"
        );
    }

    #[test]
    fn an_ipv4_client_of_a_dual_stack_socket_is_shown_as_ipv4() {
        let mapped = "[::ffff:10.16.0.5]:80".parse().unwrap();
        assert_eq!(unmapped(mapped).to_string(), "10.16.0.5:80");
        let plain = "[fd00::1]:80".parse().unwrap();
        assert_eq!(unmapped(plain), plain);
    }
}
