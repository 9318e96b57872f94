//! How much one caller may take of a lead's door, so that there is something left for the others.
//!
//! | bound | of | beyond it |
//! |---|---|---|
//! | requests in a second ([`Limits::new`]), twice as many at once | a user, a token, an agent | 429, with the time to wait |
//! | tokens that do not count in a second ([`MISTAKES`]), twice as many at once | an address | 429, and no line in the log |
//! | connections at once ([`CONNECTIONS`]) | an identity | the connection is closed |
//! | time of one request ([`LASTS`]) | everybody, at the control API | 408 |
//!
//! Each lead counts for itself. Leads among themselves are not bounded: what they send holds the group together.

use std::{
    collections::HashMap,
    hash::Hash,
    net::IpAddr,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{extract::Request, middleware::Next, response::Response};
use governor::{
    DefaultKeyedRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};
use netmanager_api::identity::{Identity, Role};

use crate::problem::Refusal;

/// How many requests a caller may make in a second, unless the operator says otherwise: several times what one lead
/// carries out, so that it stops a runaway and no work.
pub const REQUESTS: NonZeroU32 = NonZeroU32::new(5_000).unwrap();
/// How many tokens that do not count an address may show in a second.
const MISTAKES: NonZeroU32 = NonZeroU32::new(5).unwrap();
/// How many connections one identity may have at once: an eighth of the door.
const CONNECTIONS: u32 = 512;
/// How long a request of the control API may take, from its head to the answer: a large backup on a slow line.
const LASTS: Duration = Duration::from_secs(120);
/// Beyond so many callers those are forgotten that have not asked for a while.
const KNOWN: usize = 4_096;

/// What is counted at the doors of one lead.
#[derive(Debug)]
pub(crate) struct Limits {
    requests: DefaultKeyedRateLimiter<String>,
    mistakes: DefaultKeyedRateLimiter<IpAddr>,
    connections: Mutex<HashMap<String, u32>>,
    most: u32,
}

/// A place among the connections of an identity.
#[derive(Debug)]
pub(crate) struct Place {
    limits: Arc<Limits>,
    holder: String,
}

/// Twice as many at once as in a second.
fn keyed<K: Clone + Hash + Eq>(per_second: NonZeroU32) -> DefaultKeyedRateLimiter<K> {
    let burst = per_second.saturating_add(per_second.get());
    RateLimiter::keyed(Quota::per_second(per_second).allow_burst(burst))
}

/// How long to wait for another cell of `key`, if there is none.
fn spend<K: Clone + Hash + Eq>(counts: &DefaultKeyedRateLimiter<K>, key: &K) -> Option<Duration> {
    if counts.len() > KNOWN {
        counts.retain_recent();
    }
    let until = counts.check_key(key).err()?;
    Some(until.wait_time_from(DefaultClock::default().now()))
}

impl Limits {
    /// Nothing was asked yet; a caller may ask so often in a second.
    pub(crate) fn new(requests: NonZeroU32) -> Self {
        Self {
            requests: keyed(requests),
            mistakes: keyed(MISTAKES),
            connections: Mutex::default(),
            most: CONNECTIONS,
        }
    }

    /// Counts a request; refused where there were too many.
    pub(crate) fn ask(&self, caller: &str) -> Result<(), Refusal> {
        match spend(&self.requests, &caller.to_owned()) {
            None => Ok(()),
            Some(wait) => Err(Refusal::too_many(caller, wait)),
        }
    }

    /// Counts a request of who shows a certificate.
    pub(crate) fn ask_as(&self, identity: &Identity) -> Result<(), Refusal> {
        match identity.role {
            Role::Lead { .. } => Ok(()),
            _ => self.ask(&identity.to_string()),
        }
    }

    /// Counts a token that does not count; refused where there were too many.
    pub(crate) fn mistake(&self, address: IpAddr) -> Result<(), Refusal> {
        // A host has a whole /64 of addresses.
        let address = match address.to_canonical() {
            IpAddr::V6(six) => IpAddr::from((u128::from(six) >> 64 << 64).to_be_bytes()),
            four => four,
        };
        match spend(&self.mistakes, &address) {
            None => Ok(()),
            Some(wait) => Err(Refusal::too_many(&address.to_string(), wait)),
        }
    }

    /// A place for one more connection of `identity`; `None` where it has all that it may.
    pub(crate) fn connect(self: &Arc<Self>, identity: &Identity) -> Option<Place> {
        let holder = identity.to_string();
        let mut connections = self.connections();
        let count = connections.entry(holder.clone()).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        let limits = self.clone();
        Some(Place { limits, holder })
    }

    fn connections(&self) -> std::sync::MutexGuard<'_, HashMap<String, u32>> {
        let connections = self.connections.lock();
        connections.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = self.limits.connections();
        if let Some(count) = connections.get_mut(&self.holder) {
            *count -= 1;
            if *count == 0 {
                connections.remove(&self.holder);
            }
        }
    }
}

/// Ends a request that takes too long.
pub(crate) async fn deadline(request: Request, next: Next) -> Result<Response, Refusal> {
    let answer = tokio::time::timeout(LASTS, next.run(request)).await;
    answer.map_err(|_| Refusal::late(LASTS))
}

#[cfg(test)]
mod tests {
    use axum::{Router, body::Body, http::StatusCode, middleware::from_fn, routing::get};
    use tower::ServiceExt;

    use super::*;

    fn limits(requests: u32) -> Arc<Limits> {
        Arc::new(Limits::new(NonZeroU32::new(requests).unwrap()))
    }

    fn identity(text: &str) -> Identity {
        text.parse().unwrap()
    }

    #[test]
    fn a_caller_that_asks_too_often_waits_and_the_others_do_not() {
        let limits = limits(1);
        let ann = identity("weft://demo/user/ann");
        assert_eq!(limits.ask_as(&ann), Ok(()));
        assert_eq!(limits.ask_as(&ann), Ok(()));
        assert!(limits.ask_as(&ann).is_err());
        assert_eq!(limits.ask_as(&identity("weft://demo/user/bob")), Ok(()));
        assert_eq!(limits.ask("token:ci"), Ok(()));
        let lead = identity("weft://demo/lead/a");
        for _ in 0..100 {
            assert_eq!(limits.ask_as(&lead), Ok(()));
        }
    }

    #[test]
    fn an_address_that_guesses_is_not_heard_and_its_neighbours_in_a_64_are_the_same() {
        let limits = limits(1);
        let of = |text: &str| text.parse().unwrap();
        let burst = 2 * MISTAKES.get();
        for i in 0..burst {
            assert_eq!(limits.mistake(of(&format!("2001:db8::{i}"))), Ok(()));
        }
        assert!(limits.mistake(of("2001:db8::ffff")).is_err());
        assert_eq!(limits.mistake(of("2001:db8:0:1::1")), Ok(()));
        for _ in 0..burst {
            assert_eq!(limits.mistake(of("::ffff:192.0.2.1")), Ok(()));
        }
        assert!(limits.mistake(of("192.0.2.1")).is_err());
        assert_eq!(limits.mistake(of("192.0.2.2")), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_never_ends_is_ended() {
        let never = async || std::future::pending::<()>().await;
        let at_once = async || ();
        let routes = Router::new()
            .route("/never", get(never))
            .route("/at-once", get(at_once))
            .layer(from_fn(deadline));
        for (path, want) in [
            ("/never", StatusCode::REQUEST_TIMEOUT),
            ("/at-once", StatusCode::OK),
        ] {
            let request = Request::get(path).body(Body::empty()).unwrap();
            let answer = routes.clone().oneshot(request).await.unwrap();
            assert_eq!(answer.status(), want, "{path}");
        }
    }

    #[test]
    fn an_identity_has_so_many_connections_and_another_when_one_has_ended() {
        let limits = limits(1);
        let [ann, bob] = ["ann", "bob"].map(|it| identity(&format!("weft://demo/user/{it}")));
        let mut places: Vec<_> = (0..CONNECTIONS)
            .map(|_| limits.connect(&ann).unwrap())
            .collect();
        assert!(limits.connect(&ann).is_none());
        assert!(limits.connect(&bob).is_some());
        places.pop();
        let last = limits.connect(&ann);
        assert!(last.is_some() && limits.connect(&ann).is_none());
        drop((places, last));
        assert!(limits.connections().is_empty());
    }
}
