//! Every state of a key version against everything that can be asked of it, through the public keyring.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test fails by panicking")]

use std::time::{Duration, SystemTime};

use fleet_kms_keyring::rotation::RotationPolicy;
use fleet_kms_keyring::wrapped_dek::Header;
use fleet_kms_keyring::{
    KeyId, KeyVersion, Keyring, MIN_DESTRUCTION_WAIT, NAMED_WRAP_GRACE, Operation, Rotate, State,
    TransitionError, UnwrapRefused, Version, WrapRefused,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + 20_000 * DAY
}

fn number(n: u32) -> Version {
    Version::new(n).unwrap()
}

fn id(version: Version) -> KeyId {
    KeyId::from_bytes(u128::from(version.get()).to_be_bytes())
}

fn scheduled() -> State {
    State::DestroyScheduled { not_before: now() }
}

/// A keyring whose version 1, 2 or 3 is in `state`: the subject of one row of a table.
fn with_subject(state: State) -> (Keyring, Version) {
    let part = |n: u32, state: State| KeyVersion {
        version: number(n),
        key_id: id(number(n)),
        state,
        created: now() - 60 * DAY,
        activated: (state != State::Next).then(|| now() - 20 * DAY),
        deactivated: (!matches!(state, State::Next | State::Active)).then(|| now() - DAY),
        disabled: None,
        unbacked: false,
    };
    let subject = match state {
        State::Next => 3,
        State::Active => 2,
        _ => 1,
    };
    let oldest = if subject == 1 { state } else { State::DecryptOnly };
    let parts = vec![part(1, oldest), part(2, State::Active), part(3, State::Next)];
    (Keyring::from_parts(RotationPolicy::default(), parts).unwrap(), number(subject))
}

const ALL: [fn() -> State; 6] = [
    || State::Next,
    || State::Active,
    || State::DecryptOnly,
    || State::Disabled,
    scheduled,
    || State::Destroyed,
];

#[test]
fn every_pair_of_state_and_operators_command_does_what_the_table_says() {
    type Command = fn(&mut Keyring, Version) -> Result<(), TransitionError>;
    let commands: [(&str, Command); 5] = [
        ("disable", |k, v| k.disable(v, now())),
        ("enable", |k, v| k.enable(v)),
        ("schedule", |k, v| k.schedule_destruction(v, now(), 30 * DAY)),
        ("cancel", |k, v| k.cancel_destruction(v)),
        ("destroy", |k, v| k.destroy(v, now())),
    ];
    let later = State::DestroyScheduled { not_before: now() + 30 * DAY };
    #[rustfmt::skip]
    let table: [[Option<State>; 5]; 6] = [
        // disable               enable                    schedule     cancel                 destroy
        [None,                   None,                     None,        None,                  None],                   // Next
        [None,                   None,                     None,        None,                  None],                   // Active
        [Some(State::Disabled),  None,                     None,        None,                  None],                   // DecryptOnly
        [None,                   Some(State::DecryptOnly), Some(later), None,                  None],                   // Disabled
        [None,                   None,                     None,        Some(State::Disabled), Some(State::Destroyed)], // DestroyScheduled
        [None,                   None,                     None,        None,                  None],                   // Destroyed
    ];
    for (state, row) in ALL.into_iter().zip(table) {
        for ((name, command), expected) in commands.into_iter().zip(row) {
            let (mut keyring, subject) = with_subject(state());
            let before = keyring.clone();
            let answer = command(&mut keyring, subject);
            match expected {
                Some(after) => {
                    assert_eq!(answer, Ok(()), "{name} {}", state());
                    assert_eq!(keyring.by_version(subject).unwrap().state, after, "{name} {}", state());
                }
                None => {
                    assert!(matches!(answer, Err(TransitionError::Refused { .. })), "{name} {}", state());
                    assert_eq!(keyring, before, "a refused {name} of {} changes nothing", state());
                }
            }
            assert!(Keyring::from_parts(*keyring.policy(), keyring.versions().to_vec()).is_ok());
        }
    }
}

#[test]
fn every_state_wraps_by_name_unwraps_or_is_refused_as_the_table_says() {
    let v = number;
    type Wrap = Result<Version, WrapRefused>;
    type Unwrap = Result<Version, UnwrapRefused>;
    #[rustfmt::skip]
    let table: [(Wrap, Unwrap); 6] = [
        (Err(WrapRefused::NotYetActive { version: v(3) }), Ok(v(3))),
        (Ok(v(2)),                                         Ok(v(2))),
        (Err(WrapRefused::Retired { version: v(1) }),      Ok(v(1))),
        (Err(WrapRefused::Disabled { version: v(1) }),     Err(UnwrapRefused::Disabled { version: v(1) })),
        (Err(WrapRefused::Disabled { version: v(1) }),     Err(UnwrapRefused::Disabled { version: v(1) })),
        (Err(WrapRefused::Destroyed { version: v(1) }),    Err(UnwrapRefused::Destroyed { version: v(1) })),
    ];
    for (state, (wrap, unwrap)) in ALL.into_iter().zip(table) {
        let (keyring, subject) = with_subject(state());
        let header = Header { version: subject, key_id: id(subject) };
        assert_eq!(keyring.for_wrap(Some(&id(subject)), now()).map(|k| k.version), wrap, "{}", state());
        assert_eq!(keyring.for_unwrap(&header).map(|k| k.version), unwrap, "{}", state());
        assert_eq!(keyring.for_wrap(None, now()).map(|k| k.version), Ok(v(2)), "{}", state());
    }
}

#[test]
fn every_state_goes_through_every_rotation_as_the_table_says() {
    #[rustfmt::skip]
    let table: [[State; 3]; 6] = [
        // Regular             Fresh               AfterRestore
        [State::Active,       State::DecryptOnly, State::DecryptOnly], // Next
        [State::DecryptOnly,  State::DecryptOnly, State::DecryptOnly], // Active
        [State::DecryptOnly,  State::DecryptOnly, State::DecryptOnly], // DecryptOnly
        [State::Disabled,     State::Disabled,    State::Disabled],    // Disabled
        [scheduled(),         scheduled(),        scheduled()],        // DestroyScheduled
        [State::Destroyed,    State::Destroyed,   State::Destroyed],   // Destroyed
    ];
    let rotations: [(Rotate, u32, &[u32]); 3] = [
        (Rotate::Regular, 3, &[4]),
        (Rotate::Fresh, 4, &[4, 5]),
        (Rotate::AfterRestore, 1_004, &[1_004, 1_005]),
    ];
    for (state, row) in ALL.into_iter().zip(table) {
        for ((how, active, new), after) in rotations.into_iter().zip(row) {
            let (mut keyring, subject) = with_subject(state());
            let added = keyring.rotate(how, now(), &mut id).unwrap();
            assert_eq!(added, new.iter().map(|n| number(*n)).collect::<Vec<_>>());
            assert_eq!(keyring.active().version, number(active), "{how:?}");
            assert_eq!(keyring.active().activated, Some(now()));
            assert_eq!(keyring.next().version, *added.last().unwrap(), "{how:?}");
            assert_eq!(keyring.by_version(number(2)).unwrap().deactivated, Some(now()));
            assert_eq!(keyring.by_version(subject).unwrap().state, after, "{how:?} with {}", state());
            assert!(Keyring::from_parts(*keyring.policy(), keyring.versions().to_vec()).is_ok());
        }
    }
}

#[test]
fn a_next_that_was_retired_unused_has_no_activation_time() {
    let (mut keyring, next) = with_subject(State::Next);
    keyring.rotate(Rotate::Fresh, now(), &mut id).unwrap();
    let retired = keyring.by_version(next).unwrap();
    assert_eq!((retired.activated, retired.deactivated), (None, None));
}

#[test]
fn a_version_that_was_just_active_wraps_by_name_until_it_is_disabled() {
    let (mut keyring, active) = with_subject(State::Active);
    keyring.rotate(Rotate::Regular, now(), &mut id).unwrap();
    let named =
        |keyring: &Keyring, after| keyring.for_wrap(Some(&id(active)), now() + after).map(|v| v.version);
    assert_eq!(named(&keyring, NAMED_WRAP_GRACE), Ok(active));
    assert!(named(&keyring, NAMED_WRAP_GRACE + Duration::from_nanos(1)).is_err());
    keyring.disable(active, now()).unwrap();
    assert_eq!(named(&keyring, Duration::ZERO), Err(WrapRefused::Disabled { version: active }));
}

#[test]
fn a_destroyed_version_cannot_be_enabled_and_the_answer_says_why() {
    let (mut keyring, destroyed) = with_subject(State::Destroyed);
    let refused = keyring.enable(destroyed).unwrap_err();
    let TransitionError::Refused { operation: Operation::Enable, .. } = refused else { panic!("{refused}") };
    assert_eq!(refused.to_string(), "cannot enable version 1, which is destroyed: its key is gone for good");
}

#[test]
fn every_refusal_names_what_to_do_first() {
    let message = |state, command: fn(&mut Keyring, Version) -> Result<(), TransitionError>| {
        let (mut keyring, subject) = with_subject(state);
        command(&mut keyring, subject).unwrap_err().to_string()
    };
    let destroy = |k: &mut Keyring, v| k.destroy(v, now());
    let schedule = |k: &mut Keyring, v| k.schedule_destruction(v, now(), 30 * DAY);
    assert!(message(State::Active, |k, v| k.disable(v, now())).ends_with("rotate first"));
    assert!(message(State::Next, |k, v| k.disable(v, now())).ends_with("a fresh rotation retires it"));
    assert!(message(State::DecryptOnly, schedule).ends_with("disable it first"));
    assert!(message(State::DecryptOnly, destroy).ends_with("schedule its destruction first"));
    assert!(message(State::Disabled, destroy).ends_with("schedule its destruction first"));
    assert!(message(scheduled(), |k, v| k.enable(v)).ends_with("cancel its destruction first"));
}

#[test]
fn a_destruction_waits_for_its_date_and_at_least_seven_days() {
    let (mut keyring, subject) = with_subject(State::Disabled);
    let short = MIN_DESTRUCTION_WAIT - Duration::from_nanos(1);
    let refused = Err(TransitionError::Wait { version: subject });
    assert_eq!(keyring.schedule_destruction(subject, now(), short), refused);
    assert_eq!(keyring.schedule_destruction(subject, now(), Duration::MAX), refused);
    keyring.schedule_destruction(subject, now(), MIN_DESTRUCTION_WAIT).unwrap();
    let due = now() + MIN_DESTRUCTION_WAIT;
    let early = keyring.destroy(subject, due - Duration::from_nanos(1));
    assert_eq!(early, Err(TransitionError::TooEarly { version: subject }));
    assert_eq!(keyring.destroy(subject, due), Ok(()));
}

#[test]
fn disabling_is_dated_and_a_cancelled_destruction_keeps_the_date() {
    let (mut keyring, subject) = with_subject(State::DecryptOnly);
    let disabled = |k: &Keyring| k.by_version(subject).unwrap().disabled;
    keyring.disable(subject, now()).unwrap();
    keyring.schedule_destruction(subject, now() + DAY, 30 * DAY).unwrap();
    keyring.cancel_destruction(subject).unwrap();
    assert_eq!(disabled(&keyring), Some(now()));
    keyring.enable(subject).unwrap();
    assert_eq!(disabled(&keyring), None);
}

#[test]
fn an_unknown_version_is_refused_by_number() {
    let (mut keyring, _) = with_subject(State::Active);
    let refused = keyring.disable(number(77), now()).unwrap_err();
    assert_eq!(refused, TransitionError::Unknown { version: number(77) });
    assert_eq!(refused.to_string(), "there is no version 77");
}
