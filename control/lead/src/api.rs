//! The control API's routes: parse, ask the lead, answer.

mod backup;
mod clusters;
mod leads;
mod quotas;
mod security;
mod show;

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{
        DefaultBodyLimit, Path, Query, State,
        rejection::{JsonRejection, QueryRejection},
    },
    handler::Handler,
    http::{Method, Uri},
    middleware::from_fn,
    routing::{MethodFilter, on},
};
use control_api::http::{
    Application, AppliedApplication, ApplyQuery, ApplyResponse, ApplyResult, Binding, Changed,
    Explained, List, Migration, MigrationRequest, Node, Problem, ReadQuery, Service, Status,
};
use control_core::{
    base::KnowledgeBase,
    command::{Applied, Batch, Command, Outcome},
    goal::{self, Application as Goal},
    name::{AppName, Name, ServiceName, Slot},
    placement,
    plan::{self, Inputs},
};
use utoipa::OpenApi;

use crate::{
    door::{
        caller::{Asking, Route, guard},
        limits,
    },
    lead::{AskError, Lead},
    once::{self, Key, Request},
    problem::Refusal,
    raft::propose::ProposeError,
};

/// How long an answer waits for this lead's own replica.
const FOLLOW: Duration = Duration::from_secs(3);

/// The largest backup that is restored, bytes: as large as a message between leads.
const BACKUP: usize = 48 << 20;

type Answer<T> = Result<Json<T>, Refusal>;
type Shared = State<Arc<Lead>>;
type Read = Result<Query<ReadQuery>, QueryRejection>;

/// Every route of the API, each behind [`guard`]; who may ask for it stands in `door/roles.rs`.
struct Routes {
    router: Router<Arc<Lead>>,
    listed: Vec<(String, &'static str)>,
}

impl Routes {
    fn on<H, T>(mut self, method: &Method, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, Arc<Lead>>,
        T: 'static,
    {
        let filter = MethodFilter::try_from(method.clone()).expect("a method that axum knows");
        let route = Route {
            method: method.clone(),
            path,
        };
        let handled = on(filter, handler)
            .route_layer(from_fn(guard))
            .route_layer(axum::Extension(route));
        self.listed.push((method.to_string(), path));
        self.router = self.router.route(path, handled);
        self
    }

    fn get<H, T>(self, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, Arc<Lead>>,
        T: 'static,
    {
        self.on(&Method::GET, path, handler)
    }

    fn post<H, T>(self, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, Arc<Lead>>,
        T: 'static,
    {
        self.on(&Method::POST, path, handler)
    }

    fn delete<H, T>(self, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, Arc<Lead>>,
        T: 'static,
    {
        self.on(&Method::DELETE, path, handler)
    }
}

fn all() -> Routes {
    let none = Routes {
        router: Router::new(),
        listed: Vec::new(),
    };
    none.get("/v1/applications", applications)
        .post("/v1/applications", apply)
        .delete("/v1/applications/{namespace}/{name}", remove)
        .get("/v1/services", services)
        .get("/v1/bindings", bindings)
        .get("/v1/clusters", clusters::list_all)
        .delete("/v1/clusters/{name}", clusters::forget)
        .post("/v1/clusters/{name}/drain", clusters::drain)
        .delete("/v1/clusters/{name}/drain", clusters::undrain)
        .post("/v1/clusters/{name}/invitation", clusters::invite)
        .delete("/v1/clusters/{name}/invitation", clusters::withdraw)
        .post("/v1/clusters/{name}/leave", clusters::leave)
        .get("/v1/nodes", nodes)
        .get("/v1/migrations", migrations)
        .post("/v1/migrations", migrate)
        .get("/v1/explain/{namespace}/{application}/{service}", explain)
        .get("/v1/status", status)
        .get("/v1/leads", leads::list)
        .post("/v1/leads", leads::add)
        .post("/v1/leads/drain", leads::drain_any)
        .delete("/v1/leads/{name}", leads::remove)
        .post("/v1/leads/{name}/drain", leads::drain)
        .get("/v1/backup", backup::backup)
        .post(
            "/v1/restore",
            backup::restore.layer(DefaultBodyLimit::max(BACKUP)),
        )
        .get("/v1/tokens", security::tokens)
        .post("/v1/tokens", security::create_token)
        .delete("/v1/tokens/{name}", security::revoke_token)
        .get("/v1/quotas", quotas::list_all)
        .post("/v1/quotas/{namespace}", quotas::set)
        .delete("/v1/quotas/{namespace}", quotas::remove)
        .get("/v1/revocations", security::revocations)
        .post("/v1/revocations", security::revoke)
        .get("/v1/audit", security::audit)
        .get("/openapi.json", document)
}

/// Every route of the API; a request carries its [`Caller`](crate::door::caller::Caller).
pub(crate) fn routes(lead: Arc<Lead>) -> Router {
    all()
        .router
        .method_not_allowed_fallback(no_method)
        .fallback(no_path)
        .layer(from_fn(limits::deadline))
        .with_state(lead)
}

/// Every method and path that is answered.
#[cfg(test)]
pub(crate) fn listed() -> Vec<(String, &'static str)> {
    all().listed
}

/// The API's own description.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Weft control API",
        description = "Any lead answers; changes go through the leader."
    ),
    paths(
        applications,
        apply,
        remove,
        services,
        bindings,
        clusters::list_all,
        clusters::forget,
        clusters::drain,
        clusters::undrain,
        clusters::invite,
        clusters::withdraw,
        clusters::leave,
        nodes,
        migrations,
        migrate,
        explain,
        status,
        backup::backup,
        backup::restore,
        leads::list,
        leads::add,
        leads::remove,
        leads::drain,
        leads::drain_any,
        security::tokens,
        security::create_token,
        security::revoke_token,
        quotas::list_all,
        quotas::set,
        quotas::remove,
        security::revocations,
        security::revoke,
        security::audit
    )
)]
struct Description;

async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Description::openapi())
}

async fn no_path(uri: Uri) -> Refusal {
    Refusal::no_path(uri.path())
}

async fn no_method(method: Method, uri: Uri) -> Refusal {
    Refusal::method(method.as_str(), uri.path())
}

/// Reads the replica, consistently if that is asked; says whether it may be stale.
async fn read<T>(
    lead: &Lead,
    query: Read,
    show: impl FnOnce(&KnowledgeBase, Freshness) -> T,
) -> Answer<T> {
    let Query(query) = query.map_err(|error| bad_query(&error))?;
    let fresh = Freshness::of(lead, query).await?;
    Ok(Json(lead.replica.read(|base| show(base, fresh))))
}

/// How fresh an answer is.
#[derive(Clone, Copy, Debug)]
struct Freshness {
    stale: bool,
    age_ms: Option<u64>,
}

impl Freshness {
    /// Catches up, unless a stale answer is asked for.
    async fn of(lead: &Lead, query: ReadQuery) -> Result<Self, Refusal> {
        if query.consistent {
            lead.catch_up().await?;
            return Ok(Self {
                stale: false,
                age_ms: Some(0),
            });
        }
        Ok(Self::stale(lead).await)
    }

    /// An answer from what this lead knows.
    async fn stale(lead: &Lead) -> Self {
        let ms = |unheard: Duration| u64::try_from(unheard.as_millis()).unwrap_or(u64::MAX);
        Self {
            stale: true,
            age_ms: lead.unheard().await.map(ms),
        }
    }
}

fn bad_query(error: &QueryRejection) -> Refusal {
    Refusal::field("query", "", error.body_text())
}

async fn list<T>(
    lead: &Lead,
    query: Read,
    items: impl FnOnce(&KnowledgeBase) -> Vec<T>,
) -> Answer<List<T>> {
    let list = |base: &KnowledgeBase, fresh: Freshness| List {
        items: items(base),
        index: base.index,
        stale: fresh.stale,
        age_ms: fresh.age_ms,
    };
    read(lead, query, list).await
}

/// The applications.
#[utoipa::path(get, path = "/v1/applications", params(ReadQuery),
    responses((status = 200, body = List<Application>), (status = 503, body = Problem)))]
async fn applications(State(lead): Shared, query: Read) -> Answer<List<Application>> {
    list(&lead, query, show::applications).await
}

/// The services, with their semantic service IPs.
#[utoipa::path(get, path = "/v1/services", params(ReadQuery),
    responses((status = 200, body = List<Service>), (status = 503, body = Problem)))]
async fn services(State(lead): Shared, query: Read) -> Answer<List<Service>> {
    list(&lead, query, show::services).await
}

/// The bindings of all slots.
#[utoipa::path(get, path = "/v1/bindings", params(ReadQuery),
    responses((status = 200, body = List<Binding>), (status = 503, body = Problem)))]
async fn bindings(State(lead): Shared, query: Read) -> Answer<List<Binding>> {
    list(&lead, query, show::bindings).await
}

/// The nodes of all clusters.
#[utoipa::path(get, path = "/v1/nodes", params(ReadQuery),
    responses((status = 200, body = List<Node>), (status = 503, body = Problem)))]
async fn nodes(State(lead): Shared, query: Read) -> Answer<List<Node>> {
    list(&lead, query, show::nodes).await
}

/// The last migration of each slot that ever moved.
#[utoipa::path(get, path = "/v1/migrations", params(ReadQuery),
    responses((status = 200, body = List<Migration>), (status = 503, body = Problem)))]
async fn migrations(State(lead): Shared, query: Read) -> Answer<List<Migration>> {
    list(&lead, query, show::migrations).await
}

/// How this lead and its group are; never waits for a leader.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = Status)))]
async fn status(State(lead): Shared) -> Json<Status> {
    Json(show::status(&lead).await)
}

/// Why a service is where it is, and what every cluster would mean for it now.
#[utoipa::path(get, path = "/v1/explain/{namespace}/{application}/{service}",
    params(("namespace" = String, Path), ("application" = String, Path), ("service" = String, Path), ReadQuery),
    responses((status = 200, body = Explained), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn explain(
    State(lead): Shared,
    Path((namespace, application, service)): Path<(String, String, String)>,
    query: Read,
) -> Answer<Explained> {
    let text = format!("{namespace}/{application}/{service}");
    let name: ServiceName = text
        .parse()
        .map_err(|error| Refusal::name("service", &text, &error))?;
    let now = lead.clock.now_ms();
    let explained = read(&lead, query, |base, fresh| Explained {
        slots: placement::explain(base, &name, now.max(base.log_time_ms)),
        service: text.clone(),
        index: base.index,
        stale: fresh.stale,
        age_ms: fresh.age_ms,
    });
    let explained = explained.await?;
    if explained.slots.is_empty() {
        return Err(Refusal::missing("service", &text, "see weft get services"));
    }
    Ok(explained)
}

/// Applies a goal file (YAML): all of its applications, or none.
#[utoipa::path(post, path = "/v1/applications", params(ApplyQuery),
    request_body(content = String, content_type = "application/yaml"),
    responses((status = 200, body = ApplyResponse), (status = 400, body = Problem),
        (status = 409, body = Problem), (status = 503, body = Problem)))]
async fn apply(
    State(lead): Shared,
    asking: Asking,
    key: Key,
    query: Result<Query<ApplyQuery>, QueryRejection>,
    body: String,
) -> Answer<ApplyResponse> {
    let Query(query) = query.map_err(|error| bad_query(&error))?;
    let goals = goal::parse(&body)?;
    for goal in &goals {
        asking.within(goal.name.namespace.as_str())?;
    }
    let request = key.request(&lead, body.as_bytes());
    if !query.dry_run && is_clear(&lead, &goals) {
        let done = lead.propose(request.once(&lead, commands(&goals))?).await?;
        return outcome(&lead, &goals, done.outcomes, done.index).await;
    }
    lead.catch_up().await?;
    if let Some(outcomes) = request.recall(&lead, goals.len())? {
        let index = lead.replica.applied();
        return outcome(&lead, &goals, outcomes, index).await;
    }
    let before = lead.replica.read(KnowledgeBase::sketch);
    let mut tried = before.clone();
    let now = lead.clock.now_ms().max(before.log_time_ms);
    let refused = try_out(&mut tried, commands(&goals), now)
        .into_iter()
        .filter_map(Outcome::err);
    if let Some(refusal) = Refusal::all(refused.map(Refusal::from).collect()) {
        return Err(refusal);
    }
    if query.dry_run {
        // All of the mesh is planned for: a lead has others to answer meanwhile.
        let tried = lead.aside.work(move || {
            let follow = plan::plan(&tried, &Inputs::default(), now);
            try_out(&mut tried, follow, now);
            tried
        });
        let tried = tried
            .await
            .ok_or(AskError::Propose(ProposeError::Stopped))?;
        let results: Vec<_> = goals.iter().map(|goal| result(&before, goal)).collect();
        return Ok(Json(applied(&tried, &goals, &results, now, true)));
    }
    let commands = request.once(&lead, commands(&goals))?;
    let done = lead.propose(commands).await?;
    outcome(&lead, &goals, done.outcomes, done.index).await
}

/// Whether these goals need no trial: a file of one application is taken or refused as one by the Knowledge Base itself,
/// and what this replica would refuse is looked at once more when it has caught up. Without a key that must not be: a leader
/// that is gone is found by catching up, and the change itself could not be sent to another.
fn is_clear(lead: &Lead, goals: &[Goal]) -> bool {
    match goals {
        [goal] => lead
            .replica
            .read(|base| base.level >= once::LEVEL && base.check_application(goal).is_ok()),
        _ => false,
    }
}

/// The answer to an apply, once entry `index` is planned for.
async fn outcome(
    lead: &Lead,
    goals: &[Goal],
    outcomes: Vec<Outcome>,
    index: u64,
) -> Answer<ApplyResponse> {
    let mut results = Vec::new();
    let mut refusals = Vec::new();
    for outcome in outcomes {
        match outcome {
            Ok(Applied::Unchanged) => results.push(ApplyResult::Unchanged),
            Ok(Applied::Generation(1)) => results.push(ApplyResult::Created),
            Ok(_) => results.push(ApplyResult::Configured),
            Err(refusal) => refusals.push(Refusal::from(refusal)),
        }
    }
    if let Some(refusal) = Refusal::all(refusals) {
        return Err(refusal);
    }
    if let Err(error) = lead.await_plan(index).await {
        tracing::debug!(%error, "an answer does not show the plan");
        lead.replica.reach(index, FOLLOW).await;
    }
    Ok(Json(lead.replica.read(|base| {
        applied(base, goals, &results, lead.clock.now_ms(), false)
    })))
}

fn commands(goals: &[Goal]) -> Vec<Command> {
    let apply = |goal: &Goal| Command::Apply(Box::new(goal.clone()));
    goals.iter().map(apply).collect()
}

/// Makes `tried` what the Knowledge Base would be with `commands`; their outcomes.
fn try_out(tried: &mut KnowledgeBase, commands: Vec<Command>, now: u64) -> Vec<Outcome> {
    let batch = Batch {
        log_time_ms: now,
        commands,
    };
    tried.apply(tried.index + 1, &batch)
}

/// What would come of `goal`.
fn result(before: &KnowledgeBase, goal: &Goal) -> ApplyResult {
    match before.applications.get(&goal.name) {
        None => ApplyResult::Created,
        Some(known) if known.spec == *goal => ApplyResult::Unchanged,
        Some(_) => ApplyResult::Configured,
    }
}

fn applied(
    base: &KnowledgeBase,
    goals: &[Goal],
    results: &[ApplyResult],
    now_ms: u64,
    dry_run: bool,
) -> ApplyResponse {
    let now = now_ms.max(base.log_time_ms);
    let application = |(goal, result): (&Goal, &ApplyResult)| AppliedApplication {
        name: goal.name.to_string(),
        result: *result,
        generation: base.applications.get(&goal.name).map(|app| app.generation),
        slots: show::placed(base, goal, now),
    };
    ApplyResponse {
        applications: goals.iter().zip(results).map(application).collect(),
        dry_run,
        index: base.index,
    }
}

/// Deletes an application; its instances drain and stop.
#[utoipa::path(delete, path = "/v1/applications/{namespace}/{name}",
    params(("namespace" = String, Path), ("name" = String, Path)),
    responses((status = 200, body = Changed), (status = 404, body = Problem), (status = 503, body = Problem)))]
async fn remove(
    State(lead): Shared,
    key: Key,
    Path((namespace, name)): Path<(String, String)>,
) -> Answer<Changed> {
    let text = format!("{namespace}/{name}");
    let application: AppName = text
        .parse()
        .map_err(|error| Refusal::name("application", &text, &error))?;
    let request = key.request(&lead, b"");
    change(&lead, &request, Command::Delete { application }).await
}

/// Moves a slot to another cluster, make-before-break.
#[utoipa::path(post, path = "/v1/migrations", request_body = MigrationRequest,
    responses((status = 200, body = Changed), (status = 400, body = Problem),
        (status = 404, body = Problem), (status = 409, body = Problem), (status = 503, body = Problem)))]
async fn migrate(
    State(lead): Shared,
    asking: Asking,
    key: Key,
    wish: Result<Json<MigrationRequest>, JsonRejection>,
) -> Answer<Changed> {
    let Json(wish) = wish.map_err(|error| Refusal::field("body", "", error.body_text()))?;
    let slot: Slot = wish
        .slot
        .parse()
        .map_err(|error| Refusal::name("slot", &wish.slot, &error))?;
    asking.within(slot.service.namespace.as_str())?;
    let to: Name = wish
        .to
        .parse()
        .map_err(|error| Refusal::name("to", &wish.to, &error))?;
    let request = key.request(&lead, format!("{slot} {to}").as_bytes());
    lead.catch_up().await?;
    // What it was a moment ago is not what it is now: a move that runs is not asked for twice.
    if let Some(outcomes) = request.recall(&lead, 1)? {
        return changed(outcomes, lead.replica.applied());
    }
    let now = lead.clock.now_ms();
    let command = lead
        .replica
        .read(|base| plan::request_move(base, &slot, &to, now.max(base.log_time_ms)))?;
    change(&lead, &request, command).await
}

/// That every lead knows `what`, which came with feature level `wanted`.
fn check_level(lead: &Lead, what: &str, wanted: u32) -> Result<(), Refusal> {
    let level = lead.replica.read(|base| base.level);
    if level < wanted {
        return Err(Refusal::level(what, wanted, level));
    }
    Ok(())
}

async fn change(lead: &Lead, request: &Request, command: Command) -> Answer<Changed> {
    let done = lead.propose(request.once(lead, vec![command])?).await?;
    lead.replica.reach(done.index, FOLLOW).await;
    changed(done.outcomes, done.index)
}

fn changed(outcomes: Vec<Outcome>, index: u64) -> Answer<Changed> {
    let outcome = outcomes.into_iter().next();
    let applied = outcome.unwrap_or(Ok(Applied::Unchanged))?;
    Ok(Json(Changed {
        changed: applied != Applied::Unchanged,
        index,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_is_the_golden_one() {
        insta::assert_json_snapshot!(Description::openapi());
    }

    #[test]
    fn the_description_names_every_route() {
        let described = serde_json::to_value(Description::openapi()).unwrap();
        for (method, path) in listed() {
            let at = &described["paths"][path][method.to_lowercase()];
            assert!(at.is_object() || path == "/openapi.json", "{method} {path}");
        }
    }
}
