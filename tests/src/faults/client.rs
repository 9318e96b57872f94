//! A client: it writes, removes and reads registers at any lead, and asks the next one with the same key when one fails.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};
use weft_history::{Deed, Shown, random::Random};

use super::registers::{AT_A_TIME, Registers};
use crate::leads::{
    NAMESPACE,
    client::{Answer, Connection, Door, request},
};

/// How long a client asks for one change, lead after lead: longer than any fault lasts.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long one lead has: longer than it looks for its leader.
const ANSWER: Duration = Duration::from_secs(8);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(100);
/// The longest rest between two operations, milliseconds.
const REST: u64 = 400;

/// See the module.
pub(super) struct Client {
    pub(super) number: usize,
    pub(super) doors: Vec<Door>,
    pub(super) registers: Arc<Registers>,
    pub(super) random: Random,
    pub(super) stop: Arc<AtomicBool>,
}

/// What is asked for.
enum Wish {
    Write(u64),
    Remove,
}

impl Client {
    /// Does one thing after the other until it is stopped.
    ///
    /// # Errors
    /// When a lead answers what nobody may be answered.
    pub(super) async fn run(mut self) -> Result<()> {
        let mut connections = self.doors.iter().map(|_| None).collect::<Vec<_>>();
        let mut number = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let place = self.random.within(0, AT_A_TIME);
            let lead = self.random.pick(&[0, 1, 2]).to_owned();
            number += 1;
            let key = format!("c{}-{number}", self.number);
            match self.random.within(0, 100) {
                0..40 => {
                    self.read(&mut connections, lead, place).await?;
                }
                40..94 => {
                    let wish = Wish::Write(self.registers.value());
                    self.change(&mut connections, (lead, place), &key, wish)
                        .await?;
                }
                _ => {
                    let to = (lead, place);
                    self.change(&mut connections, to, &key, Wish::Remove)
                        .await?;
                }
            }
            if let Some(judged) = self.registers.take_judged() {
                // Nobody looks at it any more: where it fails it stays.
                let path = format!("/v1/applications/{NAMESPACE}/r{judged}");
                let gone = request("DELETE", &path, "application/json", Bytes::new());
                let _ = self.ask(&mut connections[lead], lead, gone).await;
            }
            sleep(Duration::from_millis(self.random.within(1, REST))).await;
        }
        Ok(())
    }

    /// Reads every register that is not retired at every lead.
    ///
    /// # Errors
    /// When one does not answer.
    pub(super) async fn look(self) -> Result<()> {
        for lead in 0..self.doors.len() {
            let mut connections: Vec<_> = self.doors.iter().map(|_| None).collect();
            for place in 0..AT_A_TIME {
                let is_answered = self.read(&mut connections, lead, place).await?;
                ensure!(is_answered, "lead {lead} does not answer after the faults");
            }
        }
        Ok(())
    }

    async fn ask(
        &self,
        connection: &mut Option<Connection>,
        lead: usize,
        request: Request<Full<Bytes>>,
    ) -> Result<Answer> {
        let asked = async {
            let open = match connection.take() {
                Some(open) => open,
                None => self.doors[lead].open().await?,
            };
            let answer = open.ask(request).await?;
            // One that failed is made anew.
            *connection = Some(open);
            Ok(answer)
        };
        timeout(ANSWER, asked).await.context("no answer in time")?
    }

    /// Reads a register; whether there was an answer.
    async fn read(
        &self,
        connections: &mut [Option<Connection>],
        lead: usize,
        place: u64,
    ) -> Result<bool> {
        let begun = self.registers.begin(place, Deed::Look);
        let request = request("GET", "/v1/applications", "application/json", Bytes::new());
        let answer = self.ask(&mut connections[lead], lead, request).await;
        let shown = match answer {
            Ok(answer) if answer.status == StatusCode::OK => {
                let list: Value = serde_json::from_slice(&answer.body)?;
                Some(Deed::Read(shown(&list, begun.register)?))
            }
            _ => None,
        };
        self.registers.end(begun, shown);
        Ok(shown.is_some())
    }

    async fn change(
        &self,
        connections: &mut [Option<Connection>],
        (first, place): (usize, u64),
        key: &str,
        wish: Wish,
    ) -> Result<()> {
        let deed = match wish {
            Wish::Write(value) => Deed::Write(value),
            Wish::Remove => Deed::Remove,
        };
        let begun = self.registers.begin(place, deed);
        let end = Instant::now() + PATIENCE;
        let mut lead = first;
        let mut done = None;
        while done.is_none() && Instant::now() < end {
            let mut request = match wish {
                Wish::Write(value) => {
                    let goal = goal(begun.register, value).into();
                    request("POST", "/v1/applications", "application/yaml", goal)
                }
                Wish::Remove => {
                    let path = format!("/v1/applications/{NAMESPACE}/r{}", begun.register);
                    request("DELETE", &path, "application/json", Bytes::new())
                }
            };
            let value = key.parse().context("a key is a header's value")?;
            request.headers_mut().insert("idempotency-key", value);
            if let Ok(answer) = self.ask(&mut connections[lead], lead, request).await {
                done = outcome(deed, &answer)?;
            }
            if done.is_none() {
                lead = (lead + 1) % self.doors.len();
                sleep(AGAIN).await;
            }
        }
        self.registers.end(begun, done);
        Ok(())
    }
}

/// What an answer to a change says; `None`: another lead may say more.
fn outcome(deed: Deed, answer: &Answer) -> Result<Option<Deed>> {
    match (answer.status, deed) {
        (StatusCode::OK, deed) => Ok(Some(deed)),
        (StatusCode::NOT_FOUND, Deed::Remove) => Ok(Some(Deed::Miss)),
        (status, _) if status.is_server_error() => Ok(None),
        (status, _) => {
            let said = String::from_utf8_lossy(&answer.body);
            bail!("{deed:?} was answered {status}: {said}")
        }
    }
}

fn goal(register: u64, value: u64) -> String {
    format!(
        "apiVersion: weft.dev/v1alpha1\nkind: MeshApplication\nmetadata: {{ name: r{register}, namespace: {NAMESPACE} }}\n\
         spec: {{ services: [{{ name: v{value}, command: [x], ports: [{{ name: http, port: 80 }}] }}] }}"
    )
}

/// What a list of the applications shows of a register.
fn shown(list: &Value, register: u64) -> Result<Shown> {
    let name = format!("{NAMESPACE}/r{register}");
    let items = list["items"].as_array().context("a list has items")?;
    let Some(found) = items.iter().find(|it| it["name"] == name.as_str()) else {
        return Ok(None);
    };
    let service = found["services"][0].as_str().context("it has a service")?;
    let (_, value) = service
        .rsplit_once("/v")
        .context("it is named by a value")?;
    let generation = found["generation"].as_u64();
    Ok(Some((
        value.parse()?,
        generation.context("it has a generation")?,
    )))
}
