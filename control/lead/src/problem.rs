//! How a refusal reaches a user: a status and a [`Problem`].

use std::time::Duration;

use axum::{
    Json,
    http::{StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use control_api::http::Problem;
use control_core::{
    command,
    goal::{GoalError, GoalErrors},
    name::NameError,
};
use netmanager_api::identity::Identity;

use crate::{
    door::caller::Caller,
    lead::AskError,
    raft::{members::MemberError, propose::ProposeError},
};

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    status: StatusCode,
    problem: Box<Problem>,
    /// How long to wait before it is asked again.
    wait: Option<Duration>,
}

impl Refusal {
    fn new(status: StatusCode, error: impl ToString) -> Self {
        Self {
            status,
            problem: Box::new(Problem {
                error: error.to_string(),
                ..Problem::default()
            }),
            wait: None,
        }
    }

    fn hint(mut self, hint: &str) -> Self {
        self.problem.hint = Some(hint.to_owned());
        self
    }

    /// A field of the request is wrong.
    pub(crate) fn field(field: &str, value: &str, error: impl ToString) -> Self {
        let mut refusal = Self::new(StatusCode::BAD_REQUEST, error);
        refusal.problem.field = Some(field.to_owned());
        refusal.problem.value = Some(value.to_owned());
        refusal
    }

    /// There is no such thing.
    pub(crate) fn missing(kind: &str, name: &str, hint: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("no {kind} {name}")).hint(hint)
    }

    /// Nobody answers at this path.
    pub(crate) fn no_path(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("nothing is at {path}"))
            .hint("GET /openapi.json lists what is")
    }

    /// The method does not fit the path.
    pub(crate) fn method(method: &str, path: &str) -> Self {
        let error = format!("{path} does not take {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, error)
            .hint("GET /openapi.json lists what it does")
    }

    /// The certificate's role may not ask for this.
    pub(crate) fn role(identity: &Identity, expected: &str) -> Self {
        let error = format!("{identity} may not do this: it takes the role {expected}");
        Self::new(StatusCode::FORBIDDEN, error)
            .hint("weft cert --role ROLE issues a certificate for another role")
    }

    /// Who asks may not.
    pub(crate) fn access(caller: &Caller, namespace: Option<&str>, takes: &str) -> Self {
        let place = namespace.map(|it| format!(" in namespace {it}"));
        let place = place.unwrap_or_default();
        let error = format!("{caller} may not do this{place}: it takes access {takes}");
        Self::new(StatusCode::FORBIDDEN, error)
            .hint("ask an admin for a certificate (weft cert --role user --access ...) or a token (weft token create)")
    }

    /// Nobody may ask for this.
    pub(crate) fn nobody() -> Self {
        Self::new(StatusCode::FORBIDDEN, "this opens for nobody")
    }

    /// Nobody is known to ask.
    pub(crate) fn token(why: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, why)
            .hint("this door takes a header Authorization: Bearer NAME.SECRET (weft token create)")
    }

    /// Not every lead knows this yet.
    pub(crate) fn level(what: &str, wanted: u32, level: u32) -> Self {
        let error = format!("{what} wait for feature level {wanted}: the mesh is at {level}");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, error)
            .hint("every lead must answer and be upgraded: weft lead list")
    }

    /// Several refusals of one request, as the first with the others behind it.
    pub(crate) fn all(refusals: Vec<Self>) -> Option<Self> {
        let mut refusals = refusals.into_iter();
        let mut first = refusals.next()?;
        let rest = refusals.map(|next| *next.problem);
        first.problem.more.extend(rest);
        Some(first)
    }

    /// A caller asks too often.
    pub(crate) fn too_many(caller: &str, wait: Duration) -> Self {
        let error = format!("{caller} asks too often: not again before {wait:.1?} have passed");
        let hint = "ask less often, or of several leads; the operator sets the rate with weft lead --requests-per-second";
        Self {
            wait: Some(wait),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, error).hint(hint)
        }
    }

    /// A request takes too long.
    pub(crate) fn late(limit: Duration) -> Self {
        let error = format!("the request took longer than {limit:?}");
        Self::new(StatusCode::REQUEST_TIMEOUT, error)
            .hint("send it at once; a change may have been made all the same: look before it is asked again")
    }

    /// The refusal as an answer.
    pub(crate) fn answer(self) -> Response {
        let mut answer = (self.status, Json(self.problem)).into_response();
        if let Some(wait) = self.wait {
            // In whole seconds (RFC 9110, 10.2.3).
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            answer.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        answer
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        self.answer()
    }
}

impl From<AskError> for Refusal {
    fn from(error: AskError) -> Self {
        if let AskError::Member(error) = error {
            return error.into();
        }
        let refusal = Self::new(StatusCode::SERVICE_UNAVAILABLE, &error);
        match error {
            AskError::NoLeader(_) => refusal.hint(
                "changes and consistent reads wait for a majority; ?consistent=false reads what this lead knows",
            ),
            AskError::Propose(ProposeError::Unknown) => {
                refusal.hint("ask again: a change that was made already changes nothing")
            }
            AskError::Propose(ProposeError::NoRoom(_)) => refusal.hint(
                "make room on those file systems, or replace a lead by one that has it (weft lead list, weft lead replace); reads work, and what runs goes on",
            ),
            _ => refusal.hint("ask again, or ask another lead"),
        }
    }
}

impl From<MemberError> for Refusal {
    fn from(error: MemberError) -> Self {
        let status = match error {
            MemberError::Unknown(_) => StatusCode::NOT_FOUND,
            _ => StatusCode::CONFLICT,
        };
        Self::new(status, &error).hint(match error {
            MemberError::Unknown(_) => "see weft lead list",
            MemberError::Taken { .. } => {
                "a lead that lost its disk comes back as a new member: weft lead replace"
            }
            MemberError::AddressTaken { .. } => "give every lead its own address",
            MemberError::Busy(_) => "wait until weft lead list shows voters only, and ask again",
            MemberError::Last(_) => "add another lead before",
            MemberError::NoMajorityLeft { .. } => {
                "bring the silent leads back, or replace them before: weft lead replace"
            }
            MemberError::NoHeir(_) => {
                "see weft lead list: another voter must answer and be caught up"
            }
            MemberError::Raft(_) => "ask again",
        })
    }
}

impl From<command::Refusal> for Refusal {
    fn from(refusal: command::Refusal) -> Self {
        use command::Refusal as Why;
        let status = match &refusal {
            Why::UnknownCluster(_)
            | Why::UnknownApplication(_)
            | Why::UnknownService(_)
            | Why::UnknownSlot { .. } => StatusCode::NOT_FOUND,
            Why::NoMesh => StatusCode::SERVICE_UNAVAILABLE,
            Why::OverQuota { .. } => StatusCode::FORBIDDEN,
            Why::Invalid { .. } | Why::Vip { .. } | Why::OtherBackup(_) => StatusCode::BAD_REQUEST,
            _ => StatusCode::CONFLICT,
        };
        let mut answer = Self::new(status, &refusal);
        match refusal {
            Why::Vip { path, address, .. } => {
                answer.problem.field = Some(path);
                answer.problem.value = Some(address);
            }
            Why::Invalid { path, .. } => answer.problem.field = Some(path),
            _ => {}
        }
        answer
    }
}

impl From<GoalError> for Refusal {
    fn from(error: GoalError) -> Self {
        let mut refusal = Self::new(StatusCode::BAD_REQUEST, &error.message);
        refusal.problem.field = Some(error.path).filter(|path| !path.is_empty());
        refusal.problem.line = Some(error.line).filter(|line| *line > 0);
        refusal
    }
}

impl From<GoalErrors> for Refusal {
    fn from(errors: GoalErrors) -> Self {
        let refusals = errors.0.into_iter().map(Self::from).collect();
        let empty = || Self::new(StatusCode::BAD_REQUEST, "the goal file is not valid");
        Self::all(refusals).unwrap_or_else(empty)
    }
}

impl Refusal {
    /// A name in the path is none.
    pub(crate) fn name(field: &str, value: &str, error: &NameError) -> Self {
        Self::field(field, value, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_is_the_golden_one() {
        let identity: Identity = "weft://demo/agent/edge".parse().unwrap();
        let caller = Caller {
            name: "ann".to_owned(),
            access: netmanager_api::identity::Access::Viewer,
        };
        let goals = GoalErrors(vec![
            GoalError {
                path: "spec.services[1].requests.cpu".to_owned(),
                line: 12,
                message: "\"100x\" has no unit that cpu knows: write 100m or 0.1".to_owned(),
            },
            GoalError {
                path: String::new(),
                line: 0,
                message: "the file is empty".to_owned(),
            },
        ]);
        let no_application = || command::Refusal::UnknownApplication("a/b".parse().unwrap());
        let bad_name = "A".parse::<control_core::name::Name>().unwrap_err();
        let vip = command::Refusal::Vip {
            path: "spec.services[0].vips.balanced".to_owned(),
            address: "10.24.0.7".to_owned(),
            problem: "belongs to a/b/c".to_owned(),
        };
        let refusals = [
            Refusal::from(goals),
            Refusal::from(no_application()),
            Refusal::from(vip),
            Refusal::from(command::Refusal::NoMesh),
            Refusal::from(command::Refusal::ClusterLost("edge".parse().unwrap())),
            Refusal::from(AskError::NoLeader("a at 192.0.2.1:7000".to_owned())),
            Refusal::from(AskError::Propose(ProposeError::Unknown)),
            Refusal::from(AskError::Propose(ProposeError::NoRoom(
                "a has 12Mi free of a reserve of 256Mi".to_owned(),
            ))),
            Refusal::from(AskError::Lagging),
            Refusal::from(AskError::Member(MemberError::Unknown("d".to_owned()))),
            Refusal::from(AskError::Member(MemberError::NoMajorityLeft {
                name: "b".to_owned(),
                left: 2,
                silent: vec!["c".to_owned()],
            })),
            Refusal::name("to", "A", &bad_name),
            Refusal::role(&identity, "user"),
            Refusal::access(&caller, Some("shop"), "deployer/shop or admin"),
            Refusal::nobody(),
            Refusal::token("no token was shown"),
            Refusal::missing("service", "a/b/c", "see weft get services"),
            Refusal::no_path("/v2"),
            Refusal::method("PUT", "/v1/nodes"),
            Refusal::all(vec![
                Refusal::from(no_application()),
                Refusal::from(no_application()),
            ])
            .unwrap(),
        ];
        let shown = refusals.map(|refusal| (refusal.status.as_u16(), refusal.problem));
        insta::assert_json_snapshot!(shown);
    }
}
