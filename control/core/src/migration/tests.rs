use super::*;

const AT: At = At {
    now_ms: 100,
    revision: Revision {
        incarnation: 1,
        index: 9,
    },
};

#[test]
fn every_event_in_every_state_has_its_place() {
    use Event as E;
    let repointing = State::Repointing {
        revision: AT.revision,
    };
    let draining = State::Draining {
        deadline_ms: AT.now_ms + DRAIN_MS,
    };
    let forward = [
        (State::Starting, E::TargetReady, repointing, Action::Repoint),
        (repointing, E::Repointed, draining, Action::Drain),
        (draining, E::Drained, State::Stopping, Action::StopSource),
        (
            State::Stopping,
            E::SourceGone,
            State::Done,
            Action::BindTarget,
        ),
    ];
    let mut cases: Vec<(State, Event, State, Action)> = forward.to_vec();
    for state in [State::Starting, repointing, draining] {
        cases.push((state, E::TargetFailed, State::RolledBack, Action::RollBack));
        cases.push((state, E::Cancel, State::RolledBack, Action::RollBack));
        cases.push((state, E::SourceLost, State::Done, Action::TakeOver));
    }
    let states = [
        State::Starting,
        repointing,
        draining,
        State::Stopping,
        State::Done,
        State::RolledBack,
    ];
    let events = [
        E::TargetReady,
        E::TargetFailed,
        E::Repointed,
        E::Drained,
        E::SourceGone,
        E::SourceLost,
        E::Cancel,
    ];
    for state in states {
        for event in events {
            let case = cases.iter().find(|(s, e, ..)| (*s, *e) == (state, event));
            let want = case.map_or((state, None), |(_, _, to, action)| (*to, Some(*action)));
            assert_eq!(step(state, event, AT), want, "{event:?} in {state:?}");
        }
    }
}

#[test]
fn there_is_no_way_back_once_the_source_stops() {
    for state in [State::Stopping, State::Done] {
        for event in [Event::Cancel, Event::TargetFailed, Event::SourceLost] {
            assert_eq!(step(state, event, AT), (state, None));
        }
    }
}
