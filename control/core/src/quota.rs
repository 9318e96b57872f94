//! How much the applications of a namespace may ask for together.
//!
//! ```text
//!  goals of a namespace --usage--> Amounts --check(quota)--> taken, or what is too much
//! ```
//!
//! It counts what the goals ask for, every replica of it, and not what happens to run: so the answer is the same whoever
//! applies what in which order, and a move, which runs two copies for a while, needs no room in it. What was applied before
//! a quota was set, or lowered, stays; it may be changed to ask for less, and for nothing more.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    base::KnowledgeBase,
    command::{Applied, Outcome, Refusal},
    goal::{Application, Bytes, Cpu},
    name::{AppName, Name},
};

/// The feature level that knows quotas.
pub const LEVEL: u32 = 5;
/// How many namespaces may have a quota.
const QUOTAS: usize = 10_000;

/// The most that a namespace may ask for; what is `None` is not bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    /// Applications.
    pub applications: Option<u64>,
    /// Replicas of all services.
    pub instances: Option<u64>,
    /// Processing power of all replicas.
    pub cpu: Option<Cpu>,
    /// Memory of all replicas.
    pub memory: Option<Bytes>,
    /// GPUs of all replicas.
    pub gpus: Option<u64>,
}

/// What goals ask for together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amounts {
    /// Applications.
    pub applications: u64,
    /// Replicas of all services.
    pub instances: u64,
    /// Processing power of all replicas.
    pub cpu: Cpu,
    /// Memory of all replicas.
    pub memory: Bytes,
    /// GPUs of all replicas.
    pub gpus: u64,
}

impl Amounts {
    /// What one application asks for.
    fn of(application: &Application) -> Self {
        let mut sum = Self {
            applications: 1,
            ..Self::default()
        };
        for service in application.services.values() {
            let (count, one) = (u64::from(service.replicas), service.requests);
            sum = sum.plus(Self {
                applications: 0,
                instances: count,
                cpu: Cpu::milli(one.cpu.as_milli().saturating_mul(count)),
                memory: Bytes::new(one.memory.get().saturating_mul(count)),
                gpus: u64::from(one.gpus).saturating_mul(count),
            });
        }
        sum
    }

    fn plus(self, other: Self) -> Self {
        let cpu = self.cpu.as_milli().saturating_add(other.cpu.as_milli());
        Self {
            applications: self.applications.saturating_add(other.applications),
            instances: self.instances.saturating_add(other.instances),
            cpu: Cpu::milli(cpu),
            memory: Bytes::new(self.memory.get().saturating_add(other.memory.get())),
            gpus: self.gpus.saturating_add(other.gpus),
        }
    }
}

/// What is too much of one kind, if anything is; what grows no further is let be.
fn problem<T: Copy + Ord + fmt::Display>(
    what: &str,
    (now, then): (T, T),
    most: Option<T>,
) -> Option<String> {
    let most = most.filter(|most| then > *most && then > now)?;
    Some(format!("{what} would be {then} of {most} ({now} now)"))
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |what, most: Option<u64>| most.map(|most| format!("{what} {most}"));
        let amounts = [
            count("applications", self.applications),
            count("instances", self.instances),
            self.cpu.map(|most| format!("cpu {most}")),
            self.memory.map(|most| format!("memory {most}")),
            count("gpus", self.gpus),
        ];
        let amounts: Vec<_> = amounts.into_iter().flatten().collect();
        f.write_str(&amounts.join(", "))
    }
}

impl Quota {
    /// What is too much, if the goals of a namespace asked for `then` in the place of `now`.
    fn problems(&self, now: &Amounts, then: &Amounts) -> Vec<String> {
        let problems = [
            problem(
                "applications",
                (now.applications, then.applications),
                self.applications,
            ),
            problem("instances", (now.instances, then.instances), self.instances),
            problem("cpu", (now.cpu, then.cpu), self.cpu),
            problem("memory", (now.memory, then.memory), self.memory),
            problem("gpus", (now.gpus, then.gpus), self.gpus),
        ];
        problems.into_iter().flatten().collect()
    }
}

impl KnowledgeBase {
    /// What the goals of a namespace ask for; with `instead` in the place of the application of its name, or beside the
    /// others.
    #[must_use]
    pub fn usage(&self, namespace: &Name, instead: Option<&Application>) -> Amounts {
        let first = AppName {
            namespace: namespace.clone(),
            name: Name::least(),
        };
        let known = self.applications.range(first..);
        let known = known.take_while(|(name, _)| name.namespace == *namespace);
        let others = known.filter(|(name, _)| instead.is_none_or(|it| it.name != **name));
        let all = others.map(|(_, state)| &state.spec).chain(instead);
        all.map(Amounts::of).fold(Amounts::default(), Amounts::plus)
    }

    /// Refuses an application that asks for more than its namespace may.
    pub(crate) fn check_quota(&self, application: &Application) -> Result<(), Refusal> {
        let namespace = &application.name.namespace;
        let Some(quota) = self.quotas.get(namespace) else {
            return Ok(());
        };
        let now = self.usage(namespace, None);
        let then = self.usage(namespace, Some(application));
        let problems = quota.problems(&now, &then);
        if problems.is_empty() {
            return Ok(());
        }
        Err(Refusal::OverQuota {
            namespace: namespace.clone(),
            problems: problems.into(),
        })
    }

    pub(crate) fn set_quota(&mut self, namespace: &Name, quota: &Quota) -> Outcome {
        if *quota == Quota::default() {
            return Err(Refusal::Invalid {
                path: "quota".to_owned(),
                problem: "bounds nothing: name an amount, or remove the quota".to_owned(),
            });
        }
        if self.quotas.get(namespace) == Some(quota) {
            return Ok(Applied::Unchanged);
        }
        if self.quotas.len() >= QUOTAS && !self.quotas.contains_key(namespace) {
            return Err(Refusal::Exhausted {
                what: "quotas".to_owned(),
                size: QUOTAS as u64,
            });
        }
        self.quotas.insert(namespace.clone(), *quota);
        Ok(Applied::Changed)
    }

    pub(crate) fn remove_quota(&mut self, namespace: &Name) -> Outcome {
        Ok(match self.quotas.remove(namespace) {
            Some(_) => Applied::Changed,
            None => Applied::Unchanged,
        })
    }
}

#[cfg(test)]
mod tests;
