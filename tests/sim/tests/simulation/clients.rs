//! What clients do: they write, remove and read registers at any lead, by the control API.
//!
//! A register is an application with one service, which is named by the value. So a write also takes numbers for
//! addresses and gives others back.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use control_api::http::{Application, Changed, List};
use http::{Method, Request, StatusCode};
use tokio::time::{sleep, timeout};
use weft_history::{Deed, History, Shown};

use crate::{network::HostWire, random::Random, trace::Trace};

/// How many registers there are.
pub(crate) const REGISTERS: u64 = 3;
/// How long a client waits for an answer; longer than a lead looks for its leader.
const PATIENCE: Duration = Duration::from_secs(7);

/// One client.
pub(crate) struct Client {
    pub(crate) number: u64,
    pub(crate) leads: u64,
    pub(crate) wire: Arc<HostWire>,
    pub(crate) history: History,
    pub(crate) random: Random,
    pub(crate) trace: Trace,
}

impl Client {
    /// Does `operations` operations, with pauses of up to `pause`.
    pub(crate) async fn run(mut self, operations: u64, pause: u64) {
        for _ in 0..operations {
            sleep(Duration::from_millis(self.random.within(1, pause))).await;
            let register = self.random.within(0, REGISTERS);
            let lead = self.random.within(0, self.leads);
            match self.random.within(0, 100) {
                0..45 => self.read(register, lead).await,
                45..92 => self.write(register, lead).await,
                _ => self.remove(register, lead).await,
            };
        }
    }

    async fn ask(&self, lead: u64, request: Request<Bytes>) -> Option<(StatusCode, Bytes)> {
        let to = usize::try_from(lead).expect("there are few leads");
        let answer = timeout(PATIENCE, self.wire.ask(to, request)).await;
        answer.ok()?.ok()
    }

    fn note(&self, register: u64, what: Option<Deed>, status: Option<StatusCode>) {
        let (client, now) = (self.number, self.wire.clock.now());
        let status = status.map_or("no answer".to_owned(), |status| status.to_string());
        self.trace.note(
            now,
            format_args!("client {client} r{register} {what:?} {status}"),
        );
    }

    /// Does something, and says what came of it.
    async fn act(
        &self,
        (register, lead): (u64, u64),
        deed: Deed,
        request: Request<Bytes>,
        read: impl FnOnce(StatusCode, &Bytes) -> Option<Deed>,
    ) -> bool {
        let operation = self.history.begin(register, deed);
        let answer = self.ask(lead, request).await;
        let status = answer.as_ref().map(|(status, _)| *status);
        let what = answer.and_then(|(status, body)| read(status, &body));
        if let Some(deed) = what {
            self.history.end(operation, deed);
        }
        self.note(register, what, status);
        what.is_some()
    }

    /// Writes a new value; whether it was acknowledged.
    pub(crate) async fn write(&self, register: u64, lead: u64) -> bool {
        let value = self.history.value();
        let goal = format!(
            "apiVersion: weft.dev/v1alpha1\nkind: MeshApplication\nmetadata: {{ name: r{register} }}\n\
             spec: {{ services: [{{ name: v{value}, command: [x], ports: [{{ name: http, port: 80 }}] }}] }}"
        );
        let request = request(Method::POST, "/v1/applications", goal);
        let deed = Deed::Write(value);
        let read = |status, _: &Bytes| (status == StatusCode::OK).then_some(deed);
        self.act((register, lead), deed, request, read).await
    }

    async fn remove(&self, register: u64, lead: u64) -> bool {
        let path = format!("/v1/applications/default/r{register}");
        let request = request(Method::DELETE, &path, String::new());
        let read = |status, body: &Bytes| match status {
            StatusCode::OK => {
                let changed: Changed = serde_json::from_slice(body).expect("the API says so");
                assert!(changed.changed, "a deletion that changed nothing");
                Some(Deed::Remove)
            }
            StatusCode::NOT_FOUND => Some(Deed::Miss),
            _ => None,
        };
        self.act((register, lead), Deed::Remove, request, read)
            .await
    }

    /// Reads a register; whether there was an answer.
    pub(crate) async fn read(&self, register: u64, lead: u64) -> bool {
        let request = request(Method::GET, "/v1/applications", String::new());
        let read = |status, body: &Bytes| {
            let list: List<Application> = match status {
                StatusCode::OK => serde_json::from_slice(body).expect("the API says so"),
                _ => return None,
            };
            Some(Deed::Read(shown(&list, register)))
        };
        self.act((register, lead), Deed::Look, request, read).await
    }
}

/// Who owns an application, and changes and moves it.
pub(crate) struct Owner {
    pub(crate) leads: u64,
    pub(crate) clusters: usize,
    pub(crate) wire: Arc<HostWire>,
    pub(crate) random: Random,
    pub(crate) trace: Trace,
}

impl Owner {
    /// Makes the application, and then changes something every now and then until `end`.
    pub(crate) async fn run(mut self, end: u64) {
        let mut version = 0;
        while !self.apply(version).await {}
        while self.wire.clock.now() < end {
            sleep(Duration::from_millis(self.random.within(500, 12_000))).await;
            if self.random.chance(400) {
                version += 1;
                self.apply(version).await;
            } else {
                self.migrate().await;
            }
        }
    }

    async fn ask(&mut self, what: &str, request: Request<Bytes>) -> bool {
        let lead = usize::try_from(self.random.within(0, self.leads)).expect("they are few");
        let answer = timeout(PATIENCE, self.wire.ask(lead, request)).await;
        let status = answer.ok().and_then(Result::ok).map(|(status, _)| status);
        let now = self.wire.clock.now();
        self.trace
            .note(now, format_args!("owner: {what} at {lead}: {status:?}"));
        status == Some(StatusCode::OK)
    }

    async fn apply(&mut self, version: u64) -> bool {
        let replicas = self.random.within(1, 4);
        let goal = format!(
            "apiVersion: weft.dev/v1alpha1\nkind: MeshApplication\nmetadata: {{ name: shop }}\nspec:\n  services:\n\
             \x20   - {{ name: front, command: [x], replicas: {replicas}, env: {{ V: \"{version}\" }}, \
             requests: {{ cpu: 100m, memory: 64Mi }}, ports: [{{ name: http, port: 80 }}] }}\n\
             \x20   - {{ name: store, command: [x], writers: one, requests: {{ cpu: 100m, memory: 64Mi }}, \
             ports: [{{ name: http, port: 80 }}] }}\n\
             \x20   - {{ name: ledger, command: [x], writers: one, ports: [{{ name: http, port: 80 }}] }}\n\
             \x20 links:\n    - {{ from: front, to: store }}\n    - {{ from: store, to: front }}\n"
        );
        let request = request(Method::POST, "/v1/applications", goal);
        self.ask("apply", request).await
    }

    async fn migrate(&mut self) {
        let service = *self.random.pick(&["front", "front", "store", "ledger"]);
        let to = self.random.within(0, self.clusters as u64);
        let wish = format!(r#"{{"slot":"default/shop/{service}#0","to":"cluster{to}"}}"#);
        let mut request = request(Method::POST, "/v1/migrations", wish);
        let json = http::HeaderValue::from_static("application/json");
        request.headers_mut().insert("content-type", json);
        self.ask("migrate", request).await;
    }
}

fn request(method: Method, path: &str, body: String) -> Request<Bytes> {
    Request::builder()
        .method(method)
        .uri(path)
        .body(Bytes::from(body))
        .expect("the parts are valid")
}

fn shown(list: &List<Application>, register: u64) -> Shown {
    let name = format!("default/r{register}");
    let application = list.items.iter().find(|it| it.name == name)?;
    let service = application.services.first()?;
    let (_, value) = service.rsplit_once("/v")?;
    Some((
        value.parse().expect("clients write numbers"),
        application.generation,
    ))
}
