//! Commands about applications: their services' numbers and addresses, and the slots that go.

use std::{borrow::Cow, collections::BTreeMap};

use ebpf_common::addr::{Mesh4, Mesh6, Name4, Name6, Policy};

use super::{
    AppState, BindingState, DRAIN_MS, KnowledgeBase, Mesh, Numbers, REST_MS, Service, Template,
    Vip,
    numbers::{Rest, Taken},
};
use crate::{
    command::{Applied, Outcome, Refusal},
    goal::{self, Application, PolicyName},
    index::Touch,
    name::{AppName, ServiceName, Slot},
};

impl KnowledgeBase {
    /// Whether `spec` would be taken now; changes nothing.
    ///
    /// # Errors
    /// What [`Command::Apply`](crate::command::Command::Apply) would be refused for.
    pub fn check_application(&self, spec: &Application) -> Result<(), Refusal> {
        spec.check()?;
        self.check_quota(spec)?;
        self.numbered_all(spec).map(|_| ())
    }

    pub(super) fn apply_application(&mut self, spec: &Application) -> Outcome {
        spec.check()?;
        let known = self.applications.get(&spec.name);
        if known.is_some_and(|known| known.spec == *spec) {
            return Ok(Applied::Unchanged);
        }
        self.check_quota(spec)?;
        let generation = known.map_or(1, |known| known.generation.saturating_add(1));
        let (numbers, services) = self.numbered_all(spec)?;
        let gone: Vec<ServiceName> = known
            .into_iter()
            .flat_map(services_of)
            .filter(|name| !services.contains_key(name))
            .collect();
        if let Cow::Owned(numbers) = numbers {
            self.numbers = numbers;
        }
        for service in gone {
            self.end_service(&service);
        }
        self.services.extend(services);
        let state = AppState {
            spec: spec.clone(),
            generation,
            changed_ms: self.log_time_ms,
        };
        self.applications.insert(spec.name.clone(), state);
        self.scale_down(spec);
        self.touch_application(&spec.name);
        Ok(Applied::Generation(generation))
    }

    pub(super) fn delete_application(&mut self, name: &AppName) -> Outcome {
        let Some(state) = self.applications.remove(name) else {
            return Err(Refusal::UnknownApplication(name.clone()));
        };
        for service in services_of(&state) {
            self.end_service(&service);
        }
        self.touch_application(name);
        Ok(Applied::Changed)
    }

    /// The services of `spec` with their numbers, and all numbers then: a copy, if one was taken or given back, so that
    /// a refusal half-way leaves nothing behind.
    fn numbered_all(
        &self,
        spec: &Application,
    ) -> Result<(Cow<'_, Numbers>, BTreeMap<ServiceName, Service>), Refusal> {
        let mut numbers = Cow::Borrowed(&self.numbers);
        let mut services = BTreeMap::new();
        for (i, (name, goal)) in spec.services.iter().enumerate() {
            let name = spec.name.service(name);
            let path = format!("spec.services[{i}]");
            let service = self.numbered(
                &mut numbers,
                &path,
                (&name, goal),
                template(spec, &name, goal),
            )?;
            services.insert(name, service);
        }
        Ok((numbers, services))
    }

    /// A service with its numbers: the ones it has, the ones asked for, or the next.
    fn numbered(
        &self,
        numbers: &mut Cow<'_, Numbers>,
        path: &str,
        (name, goal): (&ServiceName, &goal::Service),
        template: Template,
    ) -> Result<Service, Refusal> {
        let mesh = self.mesh.as_ref().ok_or(Refusal::NoMesh)?;
        let known = self.services.get(name);
        let wanted = Wanted::of(mesh, path, goal)?;
        let space4 = mesh.space4();
        let number6 = match (known, wanted.number6) {
            (Some(known), None) => known.number6,
            (Some(known), Some((number, _))) if number == known.number6 => number,
            (Some(_), Some((_, vip))) => return Err(vip.refuse(FIXED)),
            (None, Some((number, vip))) => vip.take(&mut numbers.to_mut().services6, number)?,
            (None, None) => numbers
                .to_mut()
                .services6
                .take(u32::MAX, "service numbers")?,
        };
        let known4 = known.and_then(|known| known.number4);
        let number4 = match (known4, wanted.number4) {
            (Some(known), None) => Some(known),
            (Some(known), Some((number, _))) if number == known => Some(number),
            (Some(_), Some((_, vip))) => return Err(vip.refuse(FIXED)),
            (None, Some((number, vip))) => Some(vip.take(&mut numbers.to_mut().services4, number)?),
            (None, None) => match space4 {
                Some(space) => Some(
                    numbers
                        .to_mut()
                        .services4
                        .take(1 << space.number_bits(), "IPv4 service numbers")?,
                ),
                None => None,
            },
        };
        let mut instance4 = known
            .map(|known| known.instance4.clone())
            .unwrap_or_default();
        let slots = if goal.policies.contains(&PolicyName(Policy::Instance)) {
            goal.replicas
        } else {
            0
        };
        for number in instance4.split_off(&slots).into_values() {
            let rest = self.rest_of(name);
            numbers.to_mut().instances4.release(number, rest);
        }
        if let Some(space) = space4 {
            for slot in 0..slots {
                if let std::collections::btree_map::Entry::Vacant(entry) = instance4.entry(slot) {
                    let size = 1 << space.number_bits();
                    let number = numbers
                        .to_mut()
                        .instances4
                        .take(size, "IPv4 instance numbers");
                    entry.insert(number?);
                }
            }
        }
        Ok(Service {
            number6,
            number4,
            instance4,
            template,
            decisions: known.map_or_else(BTreeMap::new, |known| {
                let kept = known.decisions.range(..goal.replicas);
                kept.map(|(slot, decision)| (*slot, decision.clone()))
                    .collect()
            }),
            refused_by: BTreeMap::new(),
        })
    }

    fn rest_of(&self, service: &ServiceName) -> Rest {
        Rest {
            until_ms: self.log_time_ms + REST_MS,
            after: Some((service.clone(), self.next_epoch)),
        }
    }

    /// A service is no more: its addresses rest, its instances stop.
    fn end_service(&mut self, name: &ServiceName) {
        let Some(service) = self.services.remove(name) else {
            return;
        };
        self.touch_service(name, Touch::Bindings);
        let rest = self.rest_of(name);
        self.numbers
            .services6
            .release(service.number6, rest.clone());
        if let Some(number) = service.number4 {
            self.numbers.services4.release(number, rest.clone());
        }
        for number in service.instance4.into_values() {
            self.numbers.instances4.release(number, rest.clone());
        }
        self.migrations.retain(|slot, _| slot.service != *name);
        for (slot, epoch) in self.bindings_where(|slot, _| slot.service == *name) {
            self.stop_binding(&slot, epoch);
        }
    }

    /// Slots that the specification no longer has: they drain, then they stop.
    fn scale_down(&mut self, spec: &Application) {
        let beyond: Vec<_> = spec
            .services
            .iter()
            .map(|(service, goal)| {
                let service = spec.name.service(service);
                service.slot(goal.replicas)..=service.slot(u32::MAX)
            })
            .collect();
        let gone: Vec<Slot> = beyond
            .iter()
            .flat_map(|beyond| self.slots.range(beyond.clone()))
            .map(|(slot, _)| slot.clone())
            .collect();
        let deadline_ms = self.log_time_ms + DRAIN_MS;
        for slot in gone {
            self.migrations.remove(&slot);
            for (slot, epoch) in self.bindings_where(|other, _| *other == slot) {
                let binding = self.slots.get_mut(&slot).and_then(|b| b.get_mut(&epoch));
                match binding {
                    Some(binding) if binding.state == BindingState::Active => {
                        binding.state = BindingState::Draining { deadline_ms };
                        self.touch_service(&slot.service, Touch::Bindings);
                        if self.unreachable(&slot, epoch) {
                            self.stop_binding(&slot, epoch);
                        }
                    }
                    Some(binding) if binding.state == BindingState::Probing => {
                        self.stop_binding(&slot, epoch);
                    }
                    _ => {}
                }
            }
        }
        // A migration of a slot that is gone is gone too, also where nothing is bound any more.
        let gone: Vec<Slot> = beyond
            .into_iter()
            .flat_map(|beyond| self.migrations.range(beyond))
            .map(|(slot, _)| slot.clone())
            .collect();
        for slot in gone {
            self.migrations.remove(&slot);
        }
    }

    /// The VIPs of a service, by policy and instance; none when there is no such service.
    #[must_use]
    pub fn vips(&self, name: &ServiceName) -> Vec<Vip> {
        let (Some(mesh), Some(service), Some(goal)) =
            (&self.mesh, self.services.get(name), self.goal(name))
        else {
            return Vec::new();
        };
        let Some(space6) = mesh.space6() else {
            return Vec::new();
        };
        let space4 = mesh.space4();
        let vip = |policy: Policy, instance: Option<u32>, number4: Option<u32>| Vip {
            policy: PolicyName(policy),
            instance,
            addr6: address6(space6, policy, service.number6, instance.unwrap_or(0)),
            addr4: space4
                .zip(number4)
                .and_then(|(space, number)| space.encode(Name4::Vip { policy, number }))
                .map(Into::into),
        };
        let mut vips = Vec::new();
        for PolicyName(policy) in goal.policies.iter().copied() {
            if policy == Policy::Instance {
                vips.extend((0..goal.replicas).map(|instance| {
                    let number4 = service.instance4.get(&instance).copied();
                    vip(policy, Some(instance), number4)
                }));
            } else {
                vips.push(vip(policy, None, service.number4));
            }
        }
        vips
    }
}

/// The services of an application.
fn services_of(state: &AppState) -> impl Iterator<Item = ServiceName> {
    let AppState { spec, .. } = state;
    spec.services.keys().map(|name| spec.name.service(name))
}

fn address6(space: Mesh6, policy: Policy, service: u32, instance: u32) -> std::net::Ipv6Addr {
    space
        .encode(Name6::Vip {
            policy,
            service,
            instance,
        })
        .into()
}

/// What an instance of `name` runs.
fn template(spec: &Application, name: &ServiceName, goal: &goal::Service) -> Template {
    Template {
        image: goal.image.clone(),
        command: goal.command.clone(),
        env: goal.env.clone(),
        ports: goal.ports.clone(),
        requests: goal.requests,
        writers: goal.writers,
        calls: spec
            .links
            .iter()
            .filter(|link| link.from == name.service)
            .map(|link| link.to.clone())
            .collect(),
    }
}

/// Why a service's address cannot be changed.
const FIXED: &str = "is not the one it has, and addresses are for a service's life: delete the service first, or leave vips out";

/// The numbers that asked-for addresses stand for, each with the address that said so.
#[derive(Default)]
struct Wanted {
    number6: Option<(u32, WantedVip)>,
    number4: Option<(u32, WantedVip)>,
}

#[derive(Clone)]
struct WantedVip {
    path: String,
    address: String,
}

impl WantedVip {
    fn refuse(self, problem: &str) -> Refusal {
        Refusal::Vip {
            path: self.path,
            address: self.address,
            problem: problem.to_owned(),
        }
    }

    fn take(self, pool: &mut super::numbers::Pool, number: u32) -> Result<u32, Refusal> {
        match pool.take_this(number) {
            Taken::Free => Ok(number),
            Taken::InUse => Err(self.refuse("is another service's: choose another")),
            Taken::Resting => Err(self
                .refuse("was another service's and rests for 10 minutes: choose another or wait")),
        }
    }
}

impl Wanted {
    fn of(mesh: &Mesh, path: &str, goal: &goal::Service) -> Result<Self, Refusal> {
        let mut wanted = Self::default();
        for (PolicyName(policy), addresses) in &goal.vips {
            for address in addresses {
                let vip = WantedVip {
                    path: format!("{path}.vips"),
                    address: address.to_string(),
                };
                let (number, place) = match address {
                    std::net::IpAddr::V4(address) => (
                        number4(mesh.space4(), address.to_bits(), *policy),
                        &mut wanted.number4,
                    ),
                    std::net::IpAddr::V6(address) => (
                        number6(mesh.space6(), address.to_bits(), *policy),
                        &mut wanted.number6,
                    ),
                };
                let Some(number) = number else {
                    let prefix = match address {
                        std::net::IpAddr::V4(_) => mesh
                            .prefix4
                            .map_or_else(|| "no IPv4 space".to_owned(), |p| p.to_string()),
                        std::net::IpAddr::V6(_) => mesh.prefix6.to_string(),
                    };
                    let problem = format!(
                        "is no VIP of policy {} in this mesh ({prefix})",
                        policy.name()
                    );
                    return Err(vip.refuse(&problem));
                };
                match place {
                    Some((other, _)) if *other != number => {
                        return Err(vip.refuse(
                            "has another number than the service's other asked-for address: all policies share one",
                        ));
                    }
                    _ => *place = Some((number, vip)),
                }
            }
        }
        Ok(wanted)
    }
}

fn number4(space: Option<Mesh4>, address: u32, want: Policy) -> Option<u32> {
    match space?.decode(address)? {
        Name4::Vip { policy, number } if policy == want && policy != Policy::Instance => {
            Some(number)
        }
        _ => None,
    }
}

fn number6(space: Option<Mesh6>, address: u128, want: Policy) -> Option<u32> {
    match space?.decode(address)? {
        Name6::Vip {
            policy, service, ..
        } if policy == want && policy != Policy::Instance => Some(service),
        _ => None,
    }
}
